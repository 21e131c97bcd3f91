//! Long work of one rank, for which the others wait.

use super::{Collective, CollectiveError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often ranks look whether all have done what they wait for.
const LOOK: Duration = Duration::from_millis(20);

/// Does `work` on a thread beside this one, in which the ranks stay in touch meanwhile: one that is lost is noticed at once, and one that
/// stands still after the usual time, however long the work of another takes. `work` is told to leave off (by its argument) where a rank
/// is lost. All ranks have come here and have done their work when this returns.
///
/// # Errors
/// A rank that is lost, or no thread.
pub fn beside<T: Send>(
    collective: &mut dyn Collective,
    work: impl FnOnce(&AtomicBool) -> T + Send,
) -> Result<T, CollectiveError> {
    let called_off = AtomicBool::new(false);
    if collective.world_size() == 1 {
        return Ok(work(&called_off));
    }
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().name("beside".into()).spawn_scoped(scope, || work(&called_off));
        let worker = worker.map_err(|source| CollectiveError::Io { operation: "starting a thread".into(), source })?;
        let kept_in_touch = loop {
            match collective.all_gather(vec![u8::from(!worker.is_finished())]) {
                Ok(busy) if busy.iter().all(|busy| *busy == [0]) => break Ok(()),
                Ok(_) => std::thread::sleep(LOOK),
                Err(error) => break Err(error),
            }
        };
        called_off.store(kept_in_touch.is_err(), Ordering::Relaxed);
        let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        kept_in_touch.map(|()| result)
    })
}
