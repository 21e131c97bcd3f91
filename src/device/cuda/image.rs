//! The kernels as nvcc has compiled them, inside this program.

/// All kernels for all architectures.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// A fatbin, as a driver loads it.
    pub fatbin: &'static [u8],
    /// `nvcc 13.0.88`
    pub compiler: &'static str,
    /// `sm_80 sm_90a sm_100 compute_100`: machine code for those, and PTX of which a driver makes machine code for later ones.
    pub architectures: &'static str,
}

/// What a driver reads as numbers must be aligned like them.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

static FATBIN: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

impl Image {
    /// The kernels of this program; none if there was no nvcc when it was built.
    pub fn embedded() -> Option<Image> {
        let image = Image {
            fatbin: &FATBIN.0,
            compiler: env!("DDPM_DIST_NVCC"),
            architectures: env!("DDPM_DIST_ARCHITECTURES"),
        };
        (!image.fatbin.is_empty()).then_some(image)
    }

    /// The lowest compute capability that it has machine code for, major and minor.
    pub fn oldest(&self) -> Option<(i32, i32)> {
        let number = |name: &str| name.strip_prefix("sm_")?.trim_end_matches(char::is_alphabetic).parse().ok();
        self.architectures.split(' ').filter_map(number).min().map(|number: i32| (number / 10, number % 10))
    }
}
