//! libcudnn.so.9: its entry points, and what it says when it refuses.

use crate::device::cuda::CudaError;
use crate::device::cuda::library::{Named, entry_points, once};
use cudarc::cudnn::sys;
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

/// The versions that this program knows, as `cudnnGetVersion` has them since 9.0: 10000·major + 100·minor + patch.
const KNOWN: std::ops::Range<usize> = 90_000..100_000;
const CUDNN: Named = Named {
    library: "cuDNN",
    needed: "9.0 or a later 9",
    install: "`pip install nvidia-cudnn-cu13`, and add its folder site-packages/nvidia/cudnn/lib to LD_LIBRARY_PATH, as launch/ddpm-dist \
              does",
};

/// `cudnnStatus_t`. A number, as later versions have statuses that cudarc does not know.
pub(super) type Status = u32;

/// What a status says about a request for something that not every engine or version does: the caller can ask for less. Some versions call a
/// mixture of types that they do not support a bad parameter.
pub(super) fn is_unsupported(status: Status) -> bool {
    (2000..4000).contains(&status)
}

/// A refusal, with its status.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: Status,
    pub error: CudaError,
}

impl From<Refusal> for CudaError {
    fn from(refusal: Refusal) -> CudaError {
        refusal.error
    }
}

entry_points! {
    CUDNN;
    version = "cudnnGetVersion": fn() -> usize;
    error_string = "cudnnGetErrorString": fn(Status) -> *const c_char;
    last_error_string = "cudnnGetLastErrorString": fn(*mut c_char, usize);
    create = "cudnnCreate": fn(*mut sys::cudnnHandle_t) -> Status;
    destroy = "cudnnDestroy": fn(sys::cudnnHandle_t) -> Status;
    set_stream = "cudnnSetStream": fn(sys::cudnnHandle_t, sys::cudaStream_t) -> Status;
    create_descriptor = "cudnnBackendCreateDescriptor":
        fn(sys::cudnnBackendDescriptorType_t, *mut sys::cudnnBackendDescriptor_t) -> Status;
    destroy_descriptor = "cudnnBackendDestroyDescriptor": fn(sys::cudnnBackendDescriptor_t) -> Status;
    set_attribute = "cudnnBackendSetAttribute": fn(
        sys::cudnnBackendDescriptor_t,
        sys::cudnnBackendAttributeName_t,
        sys::cudnnBackendAttributeType_t,
        i64,
        *const c_void
    ) -> Status;
    get_attribute = "cudnnBackendGetAttribute": fn(
        sys::cudnnBackendDescriptor_t,
        sys::cudnnBackendAttributeName_t,
        sys::cudnnBackendAttributeType_t,
        i64,
        *mut i64,
        *mut c_void
    ) -> Status;
    finalize = "cudnnBackendFinalize": fn(sys::cudnnBackendDescriptor_t) -> Status;
    execute = "cudnnBackendExecute":
        fn(sys::cudnnHandle_t, sys::cudnnBackendDescriptor_t, sys::cudnnBackendDescriptor_t) -> Status;
}

impl Library {
    /// The library of this process.
    ///
    /// # Errors
    /// None, or one of another major version.
    pub fn get() -> Result<&'static Library, CudaError> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        once(&LIBRARY, Library::load)
    }

    fn load() -> Result<Library, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        if !unsafe { sys::is_culib_present() } {
            let install = CUDNN.install;
            return Err(CudaError::NoLibrary { library: "cuDNN 9", file: "libcudnn.so.9", install });
        }
        // Before the other entry points: an old library has not all of them.
        // SAFETY: the library is there, and all versions have this call.
        let version = unsafe { sys::cudnnGetVersion() };
        if !KNOWN.contains(&version) {
            return Err(CUDNN.wrong(version_name(version)));
        }
        // SAFETY: it is there; cudarc keeps it, and the types are those of the header cudnn_graph.h.
        unsafe { Library::find(sys::culib()) }
    }

    /// `9.10.2`
    pub fn version_name(&self) -> String {
        // SAFETY: it takes nothing.
        version_name(unsafe { (self.version)() })
    }

    /// Nothing, or what was refused.
    pub fn check(&self, status: Status, action: impl FnOnce() -> String) -> Result<(), Refusal> {
        if status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS as Status {
            return Ok(());
        }
        // SAFETY: it takes any number, and gives a text that lives as long as the library.
        let name = unsafe { CStr::from_ptr((self.error_string)(status)) };
        let error = CudaError::Library {
            library: format!("cuDNN {}", self.version_name()),
            action: action(),
            status: format!("{} ({status})", name.to_string_lossy()),
            said: self.said(),
        };
        Err(Refusal { status, error })
    }

    /// What it says of the last refusal on this thread.
    fn said(&self) -> String {
        let mut text = [0u8; 512];
        // SAFETY: it writes at most so many bytes, and ends them with a zero.
        unsafe { (self.last_error_string)(text.as_mut_ptr().cast(), text.len()) };
        CStr::from_bytes_until_nul(&text).map_or(String::new(), |text| text.to_string_lossy().trim().to_string())
    }
}

/// `9.10.2` of 91002, and `8.9.7` of 8907.
fn version_name(version: usize) -> String {
    let major = if version < KNOWN.start { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}
