//! A process that waits for others and is asked to stop.

use super::Stop;
use super::exit::Code;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a rank that waits for others looks whether it is asked to stop, and how long the others may take to hear of it.
const LOOKS: Duration = Duration::from_millis(50);
const TOLD: Duration = Duration::from_millis(500);

/// Ends the process when it is asked to stop, until this is dropped: who waits for other ranks has nothing to save and sees no flag. It does
/// `first` what there is to do before.
pub(super) struct Guard {
    over: Arc<AtomicBool>,
}

impl Guard {
    pub fn new(stop: &Stop, stopped: Option<Code>, first: impl FnOnce() + Send + 'static) -> io::Result<Guard> {
        let over = Arc::new(AtomicBool::new(false));
        let (ended, stop) = (Arc::clone(&over), stop.clone());
        let mut first = Some(first);
        std::thread::Builder::new().name("guard".into()).spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                if stop.is_set() {
                    // So that the others hear of it, too.
                    std::thread::sleep(TOLD);
                    if !ended.load(Ordering::SeqCst) {
                        first.take().into_iter().for_each(|first| first());
                        let _ = writeln!(io::stderr(), "ddpm-dist: stopped before all ranks had come");
                        std::process::exit(stopped.unwrap_or(stop.code()) as i32);
                    }
                }
                std::thread::sleep(LOOKS);
            }
        })?;
        Ok(Guard { over })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}
