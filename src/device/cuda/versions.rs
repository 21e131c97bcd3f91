//! The versions of NVIDIA's software that this program is written for. Others of the same major version may do, and are spoken of; those that
//! cannot do are refused where they are loaded.

use std::fmt;

/// Software, with the first and the last minor version of it that this program is written for.
#[derive(Clone, Copy, Debug)]
pub struct WrittenFor {
    what: &'static str,
    first: Version,
    last: Version,
}

/// As `cuDriverGetVersion` tells of the newest CUDA that a driver knows.
pub const DRIVER: WrittenFor = WrittenFor { what: "a driver for CUDA", first: Version(13, 0), last: Version(13, 2) };
/// Convolutions.
pub const CUDNN: WrittenFor = WrittenFor { what: "cuDNN", first: Version(9, 10), last: Version(9, 26) };
/// Products.
pub const CUBLASLT: WrittenFor = WrittenFor { what: "cuBLASLt", first: Version(13, 0), last: Version(13, 4) };
/// Sums between GPUs. Of these, 2.28.3 to 2.28.8 lose data and are refused.
pub const NCCL: WrittenFor = WrittenFor { what: "NCCL", first: Version(2, 27), last: Version(2, 30) };

/// Major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl WrittenFor {
    /// What to say of a version (`9.10.2`) that is not among them.
    pub fn warning(&self, found: &str) -> Option<String> {
        let WrittenFor { what, first, last } = self;
        let mut numbers = found.split('.').map(|number| number.parse().unwrap_or(0));
        let version = Version(numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        (version < *first || version > *last).then(|| {
            format!("{what} {found}: this program is written for {first} to {last}; if anything is strange, use one of those")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_versions_are_told() {
        for version in ["9.10.0", "9.10.2", "9.26.99"] {
            assert_eq!(CUDNN.warning(version), None, "{version}");
        }
        for version in ["9.9.9", "9.27.0", "10.10.0", "8.9.7"] {
            let said = CUDNN.warning(version).unwrap();
            assert!(said.contains(&format!("cuDNN {version}")) && said.contains("9.10 to 9.26"), "{said}");
        }
    }
}
