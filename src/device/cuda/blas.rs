//! Matrix products by cuBLASLt. It stores columns one after another, we rows: it computes cᵀ = bᵀ·aᵀ, which in memory is the same.

use super::{CudaError, MatrixShape, Memory, Precision, ProductShape};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasLtMatmulDescAttributes_t as Of, cublasLtMatmulPreferenceAttributes_t as Prefer,
};
use cudarc::driver::sys::CUstream;
use std::ffi::c_void;
use std::rc::Rc;

/// `cublasOperation_t`
const AS_IT_IS: i32 = 0;
const TRANSPOSED: i32 = 1;

/// The library's handle.
struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// cuBLASLt on a stream.
pub(super) struct Blas {
    handle: Rc<Handle>,
    stream: CUstream,
    workspace: Memory,
}

/// The addresses of a product's operands; 0 where there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProductAddresses {
    pub a: u64,
    pub b: u64,
    pub c: u64,
    pub bias: u64,
    pub addend: u64,
}

fn refused(action: impl Into<String>, CublasError(status): CublasError) -> CudaError {
    let (status, said) = (format!("{} ({status:?})", status as u32), String::new());
    CudaError::Library { library: "cuBLASLt".into(), action: action.into(), status, said }
}

fn cannot(action: &'static str) -> impl Fn(CublasError) -> CudaError {
    move |source| refused(action, source)
}

impl Blas {
    /// The library, which computes on `stream` and may use `workspace` while it does.
    ///
    /// # Errors
    /// It is not there, or does not start.
    pub fn open(stream: CUstream, workspace: Memory) -> Result<Blas, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary {
                library: "cuBLASLt",
                file: "libcublasLt.so",
                install: "`pip install nvidia-cublas==13.*`, or install CUDA's libraries",
            });
        }
        let handle = result::create_handle().map_err(cannot("start"))?;
        Ok(Blas { handle: Rc::new(Handle(handle)), stream, workspace })
    }

    /// `13.0.1`
    pub fn version(&self) -> String {
        // SAFETY: the library is there, and all versions have this call.
        let version = unsafe { sys::cublasLtGetVersion() };
        format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
    }

    /// Chooses an algorithm for a product of these operands.
    ///
    /// # Errors
    /// There is none that is deterministic and sums in f32.
    pub fn prepare(&self, shape: &ProductShape, at: ProductAddresses) -> Result<PreparedProduct, CudaError> {
        let ProductShape { rows, columns, depth, a, b, c, .. } = *shape;
        let description = Description::new(shape, at.bias)?;
        // Theirs are transposed in memory.
        let first = Layout::of(&b, [depth, columns])?;
        let second = Layout::of(&a, [rows, depth])?;
        let sum = Layout::of(&c, [rows, columns])?;
        let preference = Preference::new(self.workspace.bytes)?;
        for (attribute, address) in [
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, at.b),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, at.a),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, if shape.has_addend { at.addend } else { at.c }),
            (Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, at.c),
        ] {
            preference.set(attribute, &alignment(address))?;
        }
        // SAFETY: all of them live.
        let found = unsafe {
            let (handle, sum) = (self.handle.0, sum.0);
            result::get_matmul_algo_heuristic(handle, description.0, first.0, second.0, sum, sum, preference.0)
        };
        let algorithm = found.map_err(|source| refused(format!("find an algorithm for the {shape}"), source))?.algo;
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
        unsafe {
            result::matmul(
                self.handle.0,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at.b as *const c_void,
                first.0,
                at.a as *const c_void,
                second.0,
                addend as *const c_void,
                sum.0,
                at.c as *mut c_void,
                sum.0,
                algorithm,
                self.workspace.address as *mut c_void,
                self.workspace.bytes,
                self.stream.cast(),
            )
        }
        .map_err(cannot("multiply matrices"))
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

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(shape: &ProductShape, bias: u64) -> Result<Description, CudaError> {
        let (sums, scalars) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let description = result::create_matmul_desc(sums, scalars).map_err(cannot("describe a product"))?;
        let description = Description(description);
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
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) }
            .map_err(cannot("describe a product"))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Of a matrix whose product takes `rows` and `columns` of it or of its transpose.
    fn of(matrix: &MatrixShape, [rows, columns]: [usize; 2]) -> Result<Layout, CudaError> {
        let (rows, columns) = if matrix.is_transposed { (columns, rows) } else { (rows, columns) };
        let (kind, stride) = (type_of(matrix.precision), matrix.stride as i64);
        // Our rows are their columns.
        let layout = result::create_matrix_layout(kind, columns as u64, rows as u64, stride);
        layout.map(Layout).map_err(cannot("describe a matrix"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(workspace: usize) -> Result<Preference, CudaError> {
        let preference = Preference(result::create_matmul_pref().map_err(cannot("ask for an algorithm"))?);
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace)?;
        // Parts of a sum are added in f32 and in one order.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        Ok(preference)
    }

    fn set<T: Copy>(&self, attribute: Prefer, value: &T) -> Result<(), CudaError> {
        // SAFETY: as in `Description::set`.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) }
            .map_err(cannot("ask for an algorithm"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it was created once and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
