//! How the data room tells its caller what it is doing, and hears that it should stop.

/// A part of opening a data set that can take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Pictures are read to know their content.
    Read,
    /// Headers of pictures are checked.
    Check,
    /// Images are decoded into the cache.
    Decode,
}

impl Phase {
    /// What a progress bar says.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Read => "reading images",
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

    /// Whether to give up, asked at each image and each few megabytes: opening then ends with [`DataError::Stopped`].
    ///
    /// [`DataError::Stopped`]: super::DataError::Stopped
    fn stopped(&self) -> bool {
        false
    }
}

/// Says nothing.
impl Progress for () {
    fn update(&self, _: Phase, _: u64, _: u64) {}
    fn notice(&self, _: &str) {}
}

/// Does the work on each of many images, unless it is to stop, and reports about a hundred times.
pub(super) struct Meter<'a> {
    progress: &'a dyn Progress,
    phase: Phase,
    done: std::sync::atomic::AtomicU64,
    total: u64,
}

impl Meter<'_> {
    pub fn new(progress: &dyn Progress, phase: Phase, total: usize) -> Meter<'_> {
        Meter { progress, phase, done: 0.into(), total: total as u64 }
    }

    pub fn count<T>(&self, work: impl FnOnce() -> Result<T, super::DataError>) -> Result<T, super::DataError> {
        go_on(self.progress)?;
        let result = work();
        let done = 1 + self.done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if done == self.total || done.is_multiple_of(self.total.div_ceil(100)) {
            self.progress.update(self.phase, done, self.total);
        }
        result
    }
}

/// An error if the caller has had enough.
pub(super) fn go_on(progress: &dyn Progress) -> Result<(), super::DataError> {
    if progress.stopped() { Err(super::DataError::Stopped) } else { Ok(()) }
}
