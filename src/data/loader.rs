//! Batches prepared ahead of the training step by a thread of their own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{DataError, Dataset, Order};

/// Which part of which batches a [`Loader`] prepares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderConfig {
    /// The global batch: images of one step over all ranks.
    pub batch: usize,
    /// This rank's part of it begins here …
    pub offset: usize,
    /// … and has so many images.
    pub count: usize,
    /// The first step that is prepared: 0, or where a run is resumed.
    pub start: u64,
    /// Batches that are prepared ahead; 3 hides a slow picture now and then.
    pub depth: usize,
}

/// One rank's images of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The step, counted from 0.
    pub step: u64,
    /// [count, H, W, C].
    pub pixels: &'a [u8],
}

/// Prepares the batches of one step after another in the background.
///
/// Buffers go round between the thread and the caller, so that a step allocates nothing (decoders of pictures excepted,
/// where pictures are decoded when they are needed).
pub struct Loader {
    /// `None` only while the loader is dropped: closing both ends the thread.
    filled: Option<Receiver<Result<Filled, DataError>>>,
    empty: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
    current: Option<Filled>,
}

struct Filled {
    step: u64,
    pixels: Vec<u8>,
}

impl Loader {
    /// Starts to prepare batches. Image j of step s is image `order.index(s·batch + j)` of the data set.
    ///
    /// # Errors
    /// [`DataError::Slice`] if the part is empty or not inside the batch; [`DataError::Threads`] if no thread can be
    /// started.
    ///
    /// # Panics
    /// If `order` is not one of `dataset`'s number of images.
    pub fn new(dataset: Arc<Dataset>, order: Order, config: LoaderConfig) -> Result<Loader, DataError> {
        assert_eq!(order.len, dataset.len(), "the order of another data set");
        let LoaderConfig { batch, offset, count, start, depth } = config;
        let slice = || DataError::Slice { batch, offset, count };
        if count == 0 || offset.checked_add(count).is_none_or(|end| end > batch) {
            return Err(slice());
        }
        let bytes = count.checked_mul(dataset.image_bytes()).ok_or_else(slice)?;
        // One more than `depth`: the caller holds one while `depth` wait.
        let buffers = depth.max(1) + 1;
        let (empty, to_fill) = sync_channel::<Vec<u8>>(buffers);
        let (done, filled) = sync_channel(buffers);
        for _ in 0..buffers {
            empty.send(vec![0; bytes]).map_err(|_| DataError::LoaderEnded)?;
        }
        let work = move || {
            let mut indices = vec![0; count];
            let mut step = start;
            while let Ok(mut pixels) = to_fill.recv() {
                let first = step.wrapping_mul(batch as u64).wrapping_add(offset as u64);
                for (index, position) in indices.iter_mut().zip(first..) {
                    *index = order.index(position);
                }
                let result = dataset.images(&indices, &mut pixels).map(|()| Filled { step, pixels });
                let failed = result.is_err();
                if done.send(result).is_err() || failed {
                    return;
                }
                step += 1;
            }
        };
        let thread = std::thread::Builder::new()
            .name("loader".into())
            .spawn(work)
            .map_err(|e| DataError::Threads { threads: 1, reason: e.to_string() })?;
        Ok(Loader { filled: Some(filled), empty: Some(empty), thread: Some(thread), current: None })
    }

    /// The batch of the next step, waiting for it if need be. The batch before it is given back.
    ///
    /// # Errors
    /// What went wrong while the batch was prepared; from then on [`DataError::LoaderEnded`].
    #[allow(clippy::should_implement_trait)] // a lending iterator: the batch borrows the loader
    pub fn next(&mut self) -> Result<Batch<'_>, DataError> {
        if let (Some(before), Some(empty)) = (self.current.take(), &self.empty) {
            // Fails only if the thread has ended, which the next line reports.
            empty.send(before.pixels).ok();
        }
        let filled = self.filled.as_ref().ok_or(DataError::LoaderEnded)?;
        let Filled { step, pixels } = self.current.insert(filled.recv().map_err(|_| DataError::LoaderEnded)??);
        Ok(Batch { step: *step, pixels })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.filled = None;
        self.empty = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed and was reported as `Stopped`.
            thread.join().ok();
        }
    }
}
