//! Matrix products by cuBLASLt. It stores columns one after another, we rows: it computes cᵀ = bᵀ·aᵀ, which in memory is the same.

mod library;
mod search;

pub use search::ProductChoice;

use super::{AlignedProduct, CudaError, MatrixShape, Memory, Precision, ProductAddresses, ProductShape};
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

/// Algorithms that are timed, at most.
const MOST: usize = 16;

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

    /// The algorithms that cuBLASLt proposes, best first by its own guess: those that sum in f32 and in one order.
    fn proposed(&self, of: &Operation, product: &AlignedProduct) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        let library = self.handle.library;
        let preference = Preference::new(library, self.workspace.bytes)?;
        let [a, b, addend, c] = product.alignments;
        // Theirs are transposed in memory.
        for (attribute, alignment) in [
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, addend),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            preference.set(attribute, &alignment)?;
        }
        let mut proposals = [Proposal::default(); MOST];
        let mut count: c_int = 0;
        // SAFETY: all of them live, and there is room for as many proposals.
        let status = unsafe {
            let (first, second, sum) = (of.first.raw, of.second.raw, of.sum.raw);
            let (most, found) = (MOST as c_int, proposals.as_mut_ptr());
            let (handle, description, preference) = (self.handle.raw, of.description.raw, preference.raw);
            (library.propose)(handle, description, first, second, sum, sum, preference, most, found, &mut count)
        };
        library.check(status, || format!("find an algorithm for the {}", product.shape))?;
        let is_there = |proposal: &&Proposal| proposal.status == 0 && proposal.workspace <= self.workspace.bytes;
        let found = &proposals[..usize::try_from(count).unwrap_or(0).min(MOST)];
        Ok(found.iter().filter(is_there).map(|proposal| proposal.algorithm).collect())
    }

    /// Refuses an operation whose algorithm cuBLASLt does not have, or that needs too much.
    fn must_have(&self, of: &Operation) -> Result<(), CudaError> {
        let library = self.handle.library;
        let mut proposal = Proposal::default();
        // SAFETY: all of them live, and the library writes to a proposal that does.
        let status = unsafe {
            let (handle, description, sum) = (self.handle.raw, of.description.raw, of.sum.raw);
            let (first, second, algorithm) = (of.first.raw, of.second.raw, &raw const of.algorithm);
            (library.check_algorithm)(handle, description, first, second, sum, sum, algorithm, &mut proposal)
        };
        library.check(status, || "have the algorithm again".into())?;
        match proposal.workspace <= self.workspace.bytes {
            true => Ok(()),
            false => Err(CudaError::NoPlan {
                library: "cuBLASLt".into(),
                what: "algorithm that was chosen before".into(),
                refusals: vec![format!("it needs {} bytes of workspace", proposal.workspace)],
            }),
        }
    }

    /// A product whose operands stand at these addresses, by the algorithm that was chosen for it.
    ///
    /// # Errors
    /// The library's.
    pub fn prepare(&self, choice: &ProductChoice, at: ProductAddresses) -> Result<Operation, CudaError> {
        let algorithm = sys::cublasLtMatmulAlgo_t { data: choice.algorithm };
        Ok(Operation { algorithm, ..Operation::new(self, &choice.product.shape, at)? })
    }

    /// Begins a product.
    ///
    /// # Errors
    /// The library's.
    ///
    /// # Safety
    /// The addresses that it was prepared with are those of its operands.
    pub unsafe fn run(&self, product: &Operation) -> Result<(), CudaError> {
        let Operation { description, first, second, sum, algorithm, at, has_addend } = product;
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
pub(super) struct Operation {
    description: Description,
    first: Layout,
    second: Layout,
    sum: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    at: ProductAddresses,
    has_addend: bool,
}

impl Operation {
    /// One without an algorithm.
    fn new(blas: &Blas, shape: &ProductShape, at: ProductAddresses) -> Result<Operation, CudaError> {
        let ProductShape { rows, columns, depth, a, b, c, has_addend, .. } = *shape;
        let library = blas.handle.library;
        let description = Description::new(library, shape, at.bias)?;
        // Theirs are transposed in memory.
        let first = Layout::of(library, &b, [depth, columns])?;
        let second = Layout::of(library, &a, [rows, depth])?;
        let sum = Layout::of(library, &c, [rows, columns])?;
        let algorithm = sys::cublasLtMatmulAlgo_t { data: [0; 8] };
        Ok(Operation { description, first, second, sum, algorithm, at, has_addend })
    }
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
