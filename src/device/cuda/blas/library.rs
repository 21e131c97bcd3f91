//! libcublasLt.so: its entry points, and what it says when it refuses.

use crate::device::cuda::CudaError;
use crate::device::cuda::library::{Named, entry_points, once};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
    cublasLtMatrixLayout_t, cudaDataType, cudaStream_t,
};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

const CUBLASLT: Named = Named {
    library: "cuBLASLt",
    needed: "that of CUDA 13",
    install: "`pip install nvidia-cublas==13.*`, or install CUDA's libraries",
};

/// `cublasStatus_t`; a number, as later versions have statuses that cudarc does not know.
pub(super) type Status = u32;

/// `cublasLtMatmulHeuristicResult_t`, likewise.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Proposal {
    pub algorithm: cublasLtMatmulAlgo_t,
    /// Bytes.
    pub workspace: usize,
    pub status: Status,
    pub waves: f32,
    pub reserved: [c_int; 4],
}

impl Default for Proposal {
    fn default() -> Proposal {
        let algorithm = cublasLtMatmulAlgo_t { data: [0; 8] };
        Proposal { algorithm, workspace: 0, status: 0, waves: 0.0, reserved: [0; 4] }
    }
}

entry_points! {
    CUBLASLT;
    version = "cublasLtGetVersion": fn() -> usize;
    status_name = "cublasLtGetStatusName": fn(Status) -> *const c_char;
    create = "cublasLtCreate": fn(*mut cublasLtHandle_t) -> Status;
    destroy = "cublasLtDestroy": fn(cublasLtHandle_t) -> Status;
    create_description = "cublasLtMatmulDescCreate":
        fn(*mut cublasLtMatmulDesc_t, cublasComputeType_t, cudaDataType) -> Status;
    destroy_description = "cublasLtMatmulDescDestroy": fn(cublasLtMatmulDesc_t) -> Status;
    set_description = "cublasLtMatmulDescSetAttribute":
        fn(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, *const c_void, usize) -> Status;
    create_layout = "cublasLtMatrixLayoutCreate": fn(*mut cublasLtMatrixLayout_t, cudaDataType, u64, u64, i64) -> Status;
    destroy_layout = "cublasLtMatrixLayoutDestroy": fn(cublasLtMatrixLayout_t) -> Status;
    create_preference = "cublasLtMatmulPreferenceCreate": fn(*mut cublasLtMatmulPreference_t) -> Status;
    destroy_preference = "cublasLtMatmulPreferenceDestroy": fn(cublasLtMatmulPreference_t) -> Status;
    set_preference = "cublasLtMatmulPreferenceSetAttribute":
        fn(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, *const c_void, usize) -> Status;
    propose = "cublasLtMatmulAlgoGetHeuristic": fn(
        cublasLtHandle_t,
        cublasLtMatmulDesc_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        cublasLtMatmulPreference_t,
        c_int,
        *mut Proposal,
        *mut c_int,
    ) -> Status;
    check_algorithm = "cublasLtMatmulAlgoCheck": fn(
        cublasLtHandle_t,
        cublasLtMatmulDesc_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t,
        *const cublasLtMatmulAlgo_t,
        *mut Proposal,
    ) -> Status;
    multiply = "cublasLtMatmul": fn(
        cublasLtHandle_t,
        cublasLtMatmulDesc_t,
        *const c_void,
        *const c_void,
        cublasLtMatrixLayout_t,
        *const c_void,
        cublasLtMatrixLayout_t,
        *const c_void,
        *const c_void,
        cublasLtMatrixLayout_t,
        *mut c_void,
        cublasLtMatrixLayout_t,
        *const cublasLtMatmulAlgo_t,
        *mut c_void,
        usize,
        cudaStream_t,
    ) -> Status;
}

impl Library {
    /// The library of this process.
    ///
    /// # Errors
    /// None, or one that lacks an entry point.
    pub fn get() -> Result<&'static Library, CudaError> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        once(&LIBRARY, Library::load)
    }

    fn load() -> Result<Library, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        if !unsafe { sys::is_culib_present() } {
            let Named { library, install, .. } = CUBLASLT;
            return Err(CudaError::NoLibrary { library, file: "libcublasLt.so", install });
        }
        // SAFETY: it is there; cudarc keeps it, and the types are those of the header cublasLt.h.
        unsafe { Library::find(sys::culib()) }
    }

    /// Nothing, or what was refused.
    pub fn check(&self, status: Status, action: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS as Status {
            return Ok(());
        }
        // SAFETY: it takes any number, and gives a text that lives as long as the library, or none.
        let name = unsafe { (self.status_name)(status) };
        let name = match name.is_null() {
            true => "unknown".into(),
            // SAFETY: a text that ends with a zero.
            false => unsafe { CStr::from_ptr(name) }.to_string_lossy(),
        };
        let (status, said) = (format!("{name} ({status})"), String::new());
        Err(CudaError::Library { library: "cuBLASLt".into(), action: action(), status, said })
    }
}
