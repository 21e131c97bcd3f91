//! Matrix products by cuBLASLt. It stores columns one after another, we rows: it computes cᵀ = bᵀ·aᵀ, which in memory is the same.

mod library;

use super::{CudaError, MatrixShape, Memory, Precision, ProductShape};
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Prefer,
};
use cudarc::driver::sys::CUstream;
use library::{Library, Proposal};
use std::ffi::{c_int, c_void};
use std::ptr;

/// `cublasOperation_t`
const AS_IT_IS: i32 = 0;
const TRANSPOSED: i32 = 1;

/// The library's handle.
struct Handle {
    raw: sys::cublasLtHandle_t,
    library: &'static Library,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { (self.library.destroy)(self.raw) };
    }
}

/// cuBLASLt on a stream.
pub(super) struct Blas {
    handle: Handle,
    stream: CUstream,
    workspace: Memory,
}

// SAFETY: a handle of cuBLASLt and a stream belong to no thread; who has the GPU binds its context to the thread first.
unsafe impl Send for Blas {}

/// The addresses of a product's operands; 0 where there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProductAddresses {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub bias: u64,
    pub addend: u64,
}

impl Blas {
    /// The library, which computes on `stream` and may use `workspace` while it does.
    ///
    /// # Errors
    /// It is not there, or does not start.
    pub fn open(stream: CUstream, workspace: Memory) -> Result<Blas, CudaError> {
        let (library, mut raw) = (Library::get()?, ptr::null_mut());
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create)(&mut raw) };
        library.check(status, || "start".into())?;
        Ok(Blas { handle: Handle { raw, library }, stream, workspace })
    }

    /// `13.0.1`
    pub fn version(&self) -> String {
        // SAFETY: it takes nothing.
        let version = unsafe { (self.handle.library.version)() };
        format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
    }

    /// Chooses an algorithm for a product of these operands.
    ///
    /// # Errors
    /// There is none that is deterministic and sums in f32.
    pub fn prepare(&self, shape: &ProductShape, at: ProductAddresses) -> Result<PreparedProduct, CudaError> {
        let ProductShape { rows, columns, depth, a, b, c, .. } = *shape;
        let library = self.handle.library;
        let description = Description::new(library, shape, at.bias)?;
        // Theirs are transposed in memory.
        let first = Layout::of(library, &b, [depth, columns])?;
        let second = Layout::of(library, &a, [rows, depth])?;
        let sum = Layout::of(library, &c, [rows, columns])?;
        let preference = Preference::new(library, self.workspace.bytes)?;
        for (attribute, address) in [
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, at.b),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, at.a),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, if shape.has_addend { at.addend } else { at.c }),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, at.c),
        ] {
            preference.set(attribute, &alignment(address))?;
        }
        let algorithm = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        let mut proposal = Proposal { algorithm, workspace: 0, status: 0, waves: 0.0, reserved: [0; 4] };
        let mut count: c_int = 0;
        // SAFETY: all of them live, and there is room for one proposal.
        let status = unsafe {
            let (handle, sum) = (self.handle.raw, sum.raw);
            let (description, first, second) = (description.raw, first.raw, second.raw);
            let (preference, proposal) = (preference.raw, &raw mut proposal);
            (library.propose)(handle, description, first, second, sum, sum, preference, 1, proposal, &mut count)
        };
        library.check(status, || format!("find an algorithm for the {shape}"))?;
        library.check(proposal.status, || format!("use its algorithm for the {shape}"))?;
        if count < 1 {
            let (library, what) = ("cuBLASLt".into(), shape.to_string());
            return Err(CudaError::NoPlan { library, what, refusals: vec!["it proposes none".into()] });
        }
        let algorithm = proposal.algorithm;
        Ok(PreparedProduct { description, first, second, sum, algorithm, at, has_addend: shape.has_addend })
    }

    /// Begins a product.
    ///
    /// # Errors
    /// The library's.
    ///
    /// # Safety
    /// The addresses that it was prepared with are those of its operands.
    pub unsafe fn run(&self, product: &PreparedProduct) -> Result<(), CudaError> {
        let PreparedProduct { description, first, second, sum, algorithm, at, has_addend } = product;
        let (alpha, beta) = (1.0f32, if *has_addend { 1.0f32 } else { 0.0 });
        let addend = if *has_addend { at.addend } else { at.c };
        // SAFETY: the descriptions live, the scalars are on the host as cuBLASLt expects if nothing else is said, and the caller vouches
        // for the addresses.
        let status = unsafe {
            (self.handle.library.multiply)(
                self.handle.raw,
                description.raw,
                (&raw const alpha).cast(),
                at.b as *const c_void,
                first.raw,
                at.a as *const c_void,
                second.raw,
                (&raw const beta).cast(),
                addend as *const c_void,
                sum.raw,
                at.c as *mut c_void,
                sum.raw,
                algorithm,
                self.workspace.address as *mut c_void,
                self.workspace.bytes,
                self.stream.cast(),
            )
        };
        self.handle.library.check(status, || "multiply matrices".into())
    }
}

/// A product whose operands stand at known addresses.
pub(super) struct PreparedProduct {
    description: Description,
    first: Layout,
    second: Layout,
    sum: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    at: ProductAddresses,
    has_addend: bool,
}

/// Bytes that an address is aligned to, as far as it matters.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

fn type_of(precision: Precision) -> sys::cudaDataType {
    match precision {
        Precision::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Precision::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

struct Description {
    raw: sys::cublasLtMatmulDesc_t,
    library: &'static Library,
}

impl Description {
    fn new(library: &'static Library, shape: &ProductShape, bias: u64) -> Result<Description, CudaError> {
        let (sums, scalars) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let mut raw = ptr::null_mut();
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create_description)(&mut raw, sums, scalars) };
        library.check(status, || "describe a product".into())?;
        let description = Description { raw, library };
        let operation = |matrix: &MatrixShape| if matrix.is_transposed { TRANSPOSED } else { AS_IT_IS };
        description.set(Of::CUBLASLT_MATMUL_DESC_TRANSA, &operation(&shape.b))?;
        description.set(Of::CUBLASLT_MATMUL_DESC_TRANSB, &operation(&shape.a))?;
        if shape.has_bias {
            // One number for each row of theirs, a column of ours; of the type of the result.
            description.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            description.set(Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
            description.set(Of::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type_of(shape.c.precision))?;
        }
        Ok(description)
    }

    fn set<T: Copy>(&self, attribute: Of, value: &T) -> Result<(), CudaError> {
        // SAFETY: the value lives until the call returns, and has the size that is told.
        let status =
            unsafe { (self.library.set_description)(self.raw, attribute, (&raw const *value).cast(), size_of::<T>()) };
        self.library.check(status, || "describe a product".into())
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { (self.library.destroy_description)(self.raw) };
    }
}

struct Layout {
    raw: sys::cublasLtMatrixLayout_t,
    library: &'static Library,
}

impl Layout {
    /// Of a matrix whose product takes `rows` and `columns` of it or of its transpose.
    fn of(library: &'static Library, matrix: &MatrixShape, [rows, columns]: [usize; 2]) -> Result<Layout, CudaError> {
        let (rows, columns) = if matrix.is_transposed { (columns, rows) } else { (rows, columns) };
        let (kind, stride) = (type_of(matrix.precision), matrix.stride as i64);
        let mut raw = ptr::null_mut();
        // Our rows are their columns.
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create_layout)(&mut raw, kind, columns as u64, rows as u64, stride) };
        library.check(status, || "describe a matrix".into())?;
        Ok(Layout { raw, library })
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { (self.library.destroy_layout)(self.raw) };
    }
}

struct Preference {
    raw: sys::cublasLtMatmulPreference_t,
    library: &'static Library,
}

impl Preference {
    fn new(library: &'static Library, workspace: usize) -> Result<Preference, CudaError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create_preference)(&mut raw) };
        library.check(status, || "ask for an algorithm".into())?;
        let preference = Preference { raw, library };
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace)?;
        // Parts of a sum are kept in the workspace in f32 and added in a separate step, in one order; or there are none. ("Results
        // Reproducibility" asks for a workspace of the caller's own, one architecture and one number of SMs.)
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        Ok(preference)
    }

    fn set<T: Copy>(&self, attribute: Prefer, value: &T) -> Result<(), CudaError> {
        // SAFETY: as in `Description::set`.
        let status =
            unsafe { (self.library.set_preference)(self.raw, attribute, (&raw const *value).cast(), size_of::<T>()) };
        self.library.check(status, || "ask for an algorithm".into())
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { (self.library.destroy_preference)(self.raw) };
    }
}
