//! What NVIDIA's libraries that are loaded have in common: entry points that are looked up by name, and how a message calls a library that is
//! of no use.

use super::CudaError;
use std::sync::OnceLock;

/// A library as messages have it.
pub(super) struct Named {
    /// `cuDNN`
    pub library: &'static str,
    /// Versions.
    pub needed: &'static str,
    /// What to do where there is none, or another.
    pub install: &'static str,
}

impl Named {
    /// It is there, and not as this program needs it.
    pub fn wrong(&self, found: String) -> CudaError {
        let Named { library, needed, install } = *self;
        CudaError::WrongLibrary { library, found, needed, install }
    }

    /// The library that is there lacks an entry point.
    pub fn without(&self, symbol: &str) -> CudaError {
        self.wrong(format!("without `{symbol}`"))
    }
}

/// The library of this process, which is loaded once it is needed; a failure is tried again.
///
/// # Errors
/// Those of `load`.
pub(super) fn once<T>(
    library: &'static OnceLock<T>,
    load: impl FnOnce() -> Result<T, CudaError>,
) -> Result<&'static T, CudaError> {
    match library.get() {
        Some(library) => Ok(library),
        None => load().map(|loaded| library.get_or_init(|| loaded)),
    }
}

/// Declares a `Library` with its entry points, whose `find` looks them up. cudarc's own calls would panic where one is missing, and their
/// result is an `enum`, which a status that it does not know must not become.
macro_rules! entry_points {
    ($named:ident; $($field:ident = $symbol:literal: fn($($argument:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        /// The library's entry points.
        #[derive(Debug)]
        pub(super) struct Library {
            $(pub $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Library {
            /// # Safety
            /// The library is never unloaded, and its header declares them so.
            unsafe fn find(library: &libloading::Library) -> Result<Library, CudaError> {
                Ok(Library {
                    // SAFETY: as the caller says.
                    $($field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }
                        .map_err(|_| $named.without($symbol))?,)*
                })
            }
        }
    };
}
pub(super) use entry_points;
