//! How the data room tells its caller what it is doing.

/// A part of opening a data set that can take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Headers of pictures are checked.
    Check,
    /// Images are decoded into the cache.
    Decode,
}

impl Phase {
    /// What a progress bar says.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Check => "checking images",
            Phase::Decode => "decoding images",
        }
    }
}

/// Receives progress and notices while a data set is opened; called from several threads.
pub trait Progress: Sync {
    /// `done` of `total` images are through `phase`; `done == total` ends it.
    fn update(&self, phase: Phase, done: u64, total: u64);

    /// Something a person should know and nothing is wrong with: which file was chosen, why a cache is built again.
    fn notice(&self, message: &str);
}

/// Says nothing.
impl Progress for () {
    fn update(&self, _: Phase, _: u64, _: u64) {}
    fn notice(&self, _: &str) {}
}
