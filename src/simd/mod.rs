//! Which vector instructions this machine has, and one macro that compiles a function for each of them.
//!
//! A function written once in plain Rust inside [`multiversion!`] is compiled three times: for AVX-512, for AVX2 with
//! FMA, and for any machine. The best one is chosen at each call by an atomic load and a branch. The written-out order of
//! floating-point operations is the same in all three; only `f32::mul_add` differs in speed (it is exact everywhere).

mod math;

pub(crate) use math::{exp, sigmoid};

use std::sync::OnceLock;
use thiserror::Error;

/// Instruction sets in order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compiler's baseline is.
    Portable,
    /// AVX2 and FMA (x86-64-v3).
    Avx2,
    /// AVX-512 F, DQ, BW and VL (x86-64-v4).
    Avx512,
}

impl Level {
    /// The name `DDPM_DIST_SIMD` and `doctor` use.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        }
    }
}

/// The environment variable that lowers the level.
const VARIABLE: &str = "DDPM_DIST_SIMD";

/// `DDPM_DIST_SIMD` names no [`Level`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "DDPM_DIST_SIMD={found} is unknown: it is portable, avx2 or avx512; unset it to use the best instructions of this machine"
)]
pub struct UnknownLevel {
    /// What it says.
    pub found: String,
}

/// The level that `DDPM_DIST_SIMD` allows; none where it is not set, or empty.
///
/// # Errors
/// It names no level.
pub fn allowed() -> Result<Option<Level>, UnknownLevel> {
    let Some(found) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else { return Ok(None) };
    let known = [Level::Portable, Level::Avx2, Level::Avx512].into_iter().find(|level| found == level.name());
    known.map(Some).ok_or_else(|| UnknownLevel { found: found.to_string_lossy().into_owned() })
}

/// The best level of this machine; `DDPM_DIST_SIMD=portable|avx2|avx512` can lower it, never raise it. A name that is none of these
/// counts as not set here: commands refuse it before they start ([`allowed`]).
pub fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = tests::FORCED.get() {
        return level;
    }
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let found = detect();
        allowed().ok().flatten().map_or(found, |most| most.min(found))
    })
}

/// Lists the features of a level, and asks the processor for each of them.
#[cfg(target_arch = "x86_64")]
macro_rules! features {
    ($list:ident, $has_all:ident: $($feature:tt)*) => {
        #[cfg(test)]
        const $list: &[&str] = &[$($feature),*];

        fn $has_all() -> bool {
            $(is_x86_feature_detected!($feature))&&*
        }
    };
}

// What `#[target_feature]` turns on for a level, here and wherever a version is chosen by `level`: all of it must be there, for a
// hypervisor can hide any one of them.
#[cfg(target_arch = "x86_64")]
features!(AVX2, has_avx2: "avx2" "fma" "bmi1" "bmi2");
#[cfg(target_arch = "x86_64")]
features!(AVX512, has_avx512: "avx512f" "avx512dq" "avx512bw" "avx512vl" "avx2" "fma" "bmi1" "bmi2");

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    if has_avx512() {
        Level::Avx512
    } else if has_avx2() {
        Level::Avx2
    } else {
        Level::Portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Compiles the function it holds once per [`Level`] and dispatches on [`level`].
///
/// The body must be plain Rust: loops over slices that the compiler can turn into vectors. It is inlined into each version. Functions
/// it calls must be `#[inline(always)]`; a closure handed to another function may not be inlined and is then compiled without vectors.
#[macro_export]
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ( $($arg:ident : $ty:ty),* $(,)? ) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi1,bmi2")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,bmi1,bmi2")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

            match $crate::simd::level() {
                // SAFETY: `level` reports an instruction set only where the processor has it.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}

#[cfg(test)]
pub(crate) use tests::{at, levels};

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::path::Path;

    thread_local! {
        /// The level of this thread's calls, whatever the machine has.
        pub(super) static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// All levels of this machine.
    pub(crate) fn levels() -> Vec<Level> {
        [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(|&level| level <= detect()).collect()
    }

    /// What `f` gives where this thread's calls take the version of `level`.
    pub(crate) fn at<R>(level: Level, f: impl FnOnce() -> R) -> R {
        assert!(level <= detect(), "this machine has no {}", level.name());
        FORCED.set(Some(level));
        let result = f();
        FORCED.set(None);
        result
    }

    multiversion! {
        fn dot(a: &[f32], b: &[f32]) -> f32 {
            a.iter().zip(b).map(|(x, y)| x * y).sum()
        }
    }

    #[test]
    fn every_version_computes_the_written_order() {
        let a: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let plain: f32 = a.iter().zip(&a).map(|(x, y)| x * y).sum();
        for level in levels() {
            assert_eq!(at(level, || dot(&a, &a)).to_bits(), plain.to_bits(), "{}", level.name());
        }
    }

    fn sources(dir: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else {
                found.extend(std::fs::read_to_string(&path));
            }
        }
    }

    /// A version that uses an instruction which was not asked for dies of SIGILL where that is missing.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn what_is_compiled_in_is_what_is_detected() {
        let mut texts = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut texts);
        let lists = texts.iter().flat_map(|text| {
            text.split("target_feature(enable = \"").skip(1).map(|rest| rest.split('"').next().unwrap())
        });
        let mut compiled = 0;
        for list in lists {
            let features: Vec<&str> = list.split(',').collect();
            assert!(features == AVX2 || features == AVX512, "{list}");
            compiled += 1;
        }
        assert!(compiled >= 6, "{compiled}");
    }
}
