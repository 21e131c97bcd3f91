//! What cuDNN's backend interface is made of: descriptors with attributes, which are set, finalized and read.

use super::library::{Library, Refusal};
use cudarc::cudnn::sys;
use cudarc::cudnn::sys::cudnnBackendAttributeName_t as Name;
use cudarc::cudnn::sys::cudnnBackendAttributeType_t as Type;
use cudarc::cudnn::sys::cudnnBackendDescriptorType_t as Kind;
use std::ffi::c_void;
use std::ptr;

/// Values that an attribute can have.
pub(super) trait Value: Copy {
    /// As the interface calls them.
    const TYPE: Type;
}

/// `cudnnBackendKnobType_t`: a number, as later versions have knobs that cudarc does not know.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub(super) struct KnobType(pub u32);

/// `cudnnBackendNumericalNote_t`, likewise.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub(super) struct NumericalNote(pub u32);

/// `cudnnBackendBehaviorNote_t`, likewise.
#[derive(Clone, Copy, Debug, Default)]
#[repr(transparent)]
pub(super) struct BehaviorNote(pub u32);

/// An address of the GPU's.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(super) struct Address(pub u64);

macro_rules! values {
    ($($value:ty: $name:ident,)*) => { $(impl Value for $value { const TYPE: Type = Type::$name; })* };
}
values! {
    i64: CUDNN_TYPE_INT64,
    f32: CUDNN_TYPE_FLOAT,
    bool: CUDNN_TYPE_BOOLEAN,
    Address: CUDNN_TYPE_VOID_PTR,
    KnobType: CUDNN_TYPE_KNOB_TYPE,
    NumericalNote: CUDNN_TYPE_NUMERICAL_NOTE,
    BehaviorNote: CUDNN_TYPE_BEHAVIOR_NOTE,
    sys::cudnnHandle_t: CUDNN_TYPE_HANDLE,
    sys::cudnnDataType_t: CUDNN_TYPE_DATA_TYPE,
    sys::cudnnConvolutionMode_t: CUDNN_TYPE_CONVOLUTION_MODE,
    sys::cudnnPointwiseMode_t: CUDNN_TYPE_POINTWISE_MODE,
    sys::cudnnBackendHeurMode_t: CUDNN_TYPE_HEUR_MODE,
}

/// A descriptor; destroyed with this. What it is made of must outlive it.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: sys::cudnnBackendDescriptor_t,
    kind: Kind,
    library: &'static Library,
}

// SAFETY: a descriptor belongs to no thread, and nothing is shared between two that are not made of each other; those of one plan go
// together.
unsafe impl Send for Descriptor {}
// SAFETY: a shared descriptor is finalized, and only read.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    /// One without attributes.
    pub fn new(library: &'static Library, kind: Kind) -> Result<Descriptor, Refusal> {
        let mut raw = ptr::null_mut();
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create_descriptor)(kind, &mut raw) };
        library.check(status, || format!("make the {}", name_of(kind)))?;
        Ok(Descriptor { raw, kind, library })
    }

    /// Sets an attribute.
    pub fn with<T: Value>(self, name: Name, values: &[T]) -> Result<Descriptor, Refusal> {
        // SAFETY: so many values of that type stand there, and the library copies them.
        unsafe { self.set(name, T::TYPE, values.len(), values.as_ptr().cast()) }?;
        Ok(self)
    }

    /// Sets an attribute to other descriptors, which must outlive this one.
    pub fn with_descriptors(self, name: Name, others: &[&Descriptor]) -> Result<Descriptor, Refusal> {
        let raw: Vec<sys::cudnnBackendDescriptor_t> = others.iter().map(|other| other.raw).collect();
        // SAFETY: so many descriptors stand there, and the library copies their addresses.
        unsafe { self.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, raw.len(), raw.as_ptr().cast()) }?;
        Ok(self)
    }

    /// # Safety
    /// So many values of that type stand there.
    unsafe fn set(&self, name: Name, kind: Type, count: usize, values: *const c_void) -> Result<(), Refusal> {
        // SAFETY: the descriptor lives; the rest is the caller's.
        let status = unsafe { (self.library.set_attribute)(self.raw, name, kind, count as i64, values) };
        self.library.check(status, || format!("set {name:?} of the {}", name_of(self.kind)))
    }

    /// Ends the setting of attributes: the library checks them together.
    pub fn finalized(self) -> Result<Descriptor, Refusal> {
        // SAFETY: the descriptor lives.
        let status = unsafe { (self.library.finalize)(self.raw) };
        self.library.check(status, || format!("finalize the {}", name_of(self.kind)))?;
        Ok(self)
    }

    /// An attribute's one value.
    pub fn value<T: Value + Default>(&self, name: Name) -> Result<T, Refusal> {
        let mut values = [T::default()];
        // SAFETY: one value of that type has room there.
        unsafe { self.get(name, T::TYPE, 1, values.as_mut_ptr().cast()) }?;
        Ok(values[0])
    }

    /// An attribute's values, at most so many.
    pub fn values<T: Value + Default>(&self, name: Name, most: usize) -> Result<Vec<T>, Refusal> {
        let mut values = vec![T::default(); most];
        // SAFETY: so many values of that type have room there.
        let count = unsafe { self.get(name, T::TYPE, most, values.as_mut_ptr().cast()) }?;
        values.truncate(count);
        Ok(values)
    }

    /// An attribute's one descriptor.
    pub fn descriptor(&self, name: Name, kind: Kind) -> Result<Descriptor, Refusal> {
        let descriptor = Descriptor::new(self.library, kind)?;
        let mut raw = descriptor.raw;
        // SAFETY: the library fills a descriptor whose address stands there.
        unsafe { self.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, (&raw mut raw).cast()) }?;
        Ok(descriptor)
    }

    /// How many descriptors an attribute has.
    pub fn count(&self, name: Name) -> Result<usize, Refusal> {
        // SAFETY: nothing is written where there is room for nothing.
        unsafe { self.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, ptr::null_mut()) }
    }

    /// An attribute's descriptors, at most so many.
    pub fn descriptors(&self, name: Name, kind: Kind, most: usize) -> Result<Vec<Descriptor>, Refusal> {
        let made: Result<Vec<Descriptor>, Refusal> = (0..most).map(|_| Descriptor::new(self.library, kind)).collect();
        let mut made = made?;
        let mut raw: Vec<sys::cudnnBackendDescriptor_t> = made.iter().map(|descriptor| descriptor.raw).collect();
        // SAFETY: the library fills so many descriptors, whose addresses stand there.
        let count = unsafe { self.get(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, most, raw.as_mut_ptr().cast()) }?;
        made.truncate(count);
        Ok(made)
    }

    /// Writes the values there is room for, and gives how many there are.
    ///
    /// # Safety
    /// So many values of that type have room there.
    unsafe fn get(&self, name: Name, kind: Type, room: usize, values: *mut c_void) -> Result<usize, Refusal> {
        let mut count = 0;
        // SAFETY: the descriptor lives; the rest is the caller's.
        let status = unsafe { (self.library.get_attribute)(self.raw, name, kind, room as i64, &mut count, values) };
        self.library.check(status, || format!("read {name:?} of the {}", name_of(self.kind)))?;
        Ok(count.max(0) as usize)
    }

    /// For calls that take descriptors.
    pub fn raw(&self) -> sys::cudnnBackendDescriptor_t {
        self.raw
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was made by the library, and nothing has it after this. A failure leaves nothing to be done.
        unsafe { (self.library.destroy_descriptor)(self.raw) };
    }
}

/// `tensor descriptor` of `CUDNN_BACKEND_TENSOR_DESCRIPTOR`
fn name_of(kind: Kind) -> String {
    format!("{kind:?}").trim_start_matches("CUDNN_BACKEND_").replace('_', " ").to_lowercase()
}
