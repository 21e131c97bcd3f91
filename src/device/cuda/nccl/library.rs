//! libnccl.so.2: its entry points, and what it says when it refuses.

use crate::device::cuda::CudaError;
use crate::device::cuda::library::{Named, entry_points, once};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// Its names, as distributions and NVIDIA's wheels have them.
const FILES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The versions that this program uses, as `ncclGetVersion` has them: 10000·major + 100·minor + patch.
const KNOWN: std::ops::Range<c_int> = 21_800..30_000;
/// Some in between lose data.
const BROKEN: std::ops::RangeInclusive<c_int> = 22_803..=22_808;
const NCCL: Named = Named {
    library: "NCCL",
    needed: "2.18 or a later 2 but 2.28.3 to 2.28.8",
    install: "`pip install nvidia-nccl-cu13`, and add its folder site-packages/nvidia/nccl/lib to LD_LIBRARY_PATH, as launch/ddpm-dist \
              does",
};

/// `ncclResult_t`; a number, as later versions have results that this program does not know.
pub(super) type Status = c_int;
pub(super) const SUCCESS: Status = 0;
/// What was asked for is under way, and the communicator takes nothing else before it is done.
pub(super) const IN_PROGRESS: Status = 7;

/// `ncclDataType_t` and `ncclRedOp_t`.
pub(super) const UINT8: c_int = 1;
pub(super) const FLOAT32: c_int = 7;
pub(super) const BFLOAT16: c_int = 9;
pub(super) const SUM: c_int = 0;

/// `ncclComm_t`
pub(super) type Handle = *mut c_void;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub [u8; super::ID_BYTES]);

/// `ncclConfig_t` as of 2.17: later libraries take it by its size and version, and what they have added stays as they have it by default.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Of a communicator whose calls return before they are done.
    pub fn non_blocking() -> Config {
        /// `NCCL_CONFIG_UNDEF_INT`: the library chooses.
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xCAFE_BEEF,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

entry_points! {
    NCCL;
    version = "ncclGetVersion": fn(*mut c_int) -> Status;
    error_string = "ncclGetErrorString": fn(Status) -> *const c_char;
    last_error = "ncclGetLastError": fn(Handle) -> *const c_char;
    unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> Status;
    init = "ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Status;
    async_error = "ncclCommGetAsyncError": fn(Handle, *mut Status) -> Status;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
    reduce_scatter = "ncclReduceScatter": fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> Status;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
    receive = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> Status;
    group_start = "ncclGroupStart": fn() -> Status;
    group_end = "ncclGroupEnd": fn() -> Status;
    finalize = "ncclCommFinalize": fn(Handle) -> Status;
    destroy = "ncclCommDestroy": fn(Handle) -> Status;
    abort = "ncclCommAbort": fn(Handle) -> Status;
}

impl Library {
    /// The library of this process.
    ///
    /// # Errors
    /// None, or one that this program does not use.
    pub fn get() -> Result<&'static Library, CudaError> {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        once(&LIBRARY, Library::load)
    }

    fn load() -> Result<Library, CudaError> {
        // SAFETY: it loads a library that has no requirements at loading.
        let found = FILES.iter().find_map(|file| unsafe { libloading::Library::new(*file) }.ok());
        let Some(library) = found else {
            return Err(CudaError::NoLibrary { library: "NCCL 2", file: FILES[0], install: NCCL.install });
        };
        let mut number = 0;
        {
            // Before the other entry points: an old library has not all of them.
            let version: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_int) -> Status> =
                // SAFETY: all versions have this call, and it is of this type.
                unsafe { library.get(b"ncclGetVersion\0") }.map_err(|_| NCCL.without("ncclGetVersion"))?;
            // SAFETY: it writes to a number that lives.
            unsafe { version(&mut number) };
        }
        if !KNOWN.contains(&number) || BROKEN.contains(&number) {
            return Err(NCCL.wrong(version_name(number)));
        }
        // SAFETY: the types are those of the header nccl.h, and it is not unloaded.
        let found = unsafe { Library::find(&library) }?;
        // It has threads of its own, and its entry points are kept.
        std::mem::forget(library);
        Ok(found)
    }

    /// `2.28.9`
    pub fn version_name(&self) -> String {
        let mut number = 0;
        // SAFETY: it writes to a number that lives.
        unsafe { (self.version)(&mut number) };
        version_name(number)
    }

    /// Whether it is done, where it is not refused.
    pub fn check(&self, status: Status, handle: Handle, action: &str) -> Result<bool, CudaError> {
        if status == SUCCESS || status == IN_PROGRESS {
            return Ok(status == SUCCESS);
        }
        // SAFETY: it takes any number, and gives a text that lives as long as the library.
        let name = unsafe { CStr::from_ptr((self.error_string)(status)) };
        // SAFETY: the handle is null or a communicator's; the text lives until the next error on this thread.
        let said = unsafe { (self.last_error)(handle) };
        let said = match said.is_null() {
            true => String::new(),
            // SAFETY: it is a text that ends with a zero.
            false => unsafe { CStr::from_ptr(said) }.to_string_lossy().trim().to_string(),
        };
        Err(CudaError::Library {
            library: format!("NCCL {}", self.version_name()),
            action: action.to_string(),
            status: format!("{} ({status})", name.to_string_lossy()),
            said,
        })
    }
}

/// `2.28.9` of 22809.
fn version_name(number: c_int) -> String {
    format!("{}.{}.{}", number / 10_000, number % 10_000 / 100, number % 100)
}
