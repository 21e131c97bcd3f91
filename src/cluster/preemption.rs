//! One rank is asked to stop, and all of them know.
//!
//! After every training step the ranks tell each other anyway. This is for the rest of the time: while data is decoded or images are
//! sampled, and some rank is told by a signal, the others learn it from the store within a moment.

use crate::rendezvous::store::Client;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// The key in the store; it holds the number of the signal.
const KEY: &str = "stop";
/// How long the store may take over one answer.
const ANSWER: Duration = Duration::from_secs(2);
/// How often a rank looks.
const EVERY: Duration = Duration::from_millis(200);

/// A request to stop, as a rank knows it.
#[derive(Clone, Debug, Default)]
pub struct StopRequest {
    /// Whether there is one.
    pub flag: Arc<AtomicBool>,
    /// The signal that it came by, SIGTERM or SIGINT, set before the flag; 0: none.
    pub signal: Arc<AtomicUsize>,
    /// The same for SIGUSR1 and SIGUSR2, which say more: a batch system sends them first, and SIGTERM later.
    pub user_signal: Arc<AtomicUsize>,
}

impl StopRequest {
    /// The signal that it came by; 0: none.
    pub fn signal(&self) -> i32 {
        let signals = [&self.user_signal, &self.signal].map(|signal| signal.load(Ordering::SeqCst) as i32);
        signals.into_iter().find(|signal| *signal != 0).unwrap_or(0)
    }
}

/// Keeps the requests of all ranks the same, until it is dropped.
#[derive(Debug)]
pub struct Preemption {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Preemption {
    /// Watches over `request` with a connection to the store that nobody else uses.
    ///
    /// # Errors
    /// A system that starts no thread.
    pub fn watch(mut store: Client, request: StopRequest) -> std::io::Result<Preemption> {
        // Whoever drops it waits for what it asked last.
        store.answer_within(ANSWER);
        let ends = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ends);
        let work = move || {
            // A store that is gone has gone with the launcher or rank 0, which the others notice by themselves.
            while !over.load(Ordering::Relaxed) && matches!(pass_on(&mut store, &request), Ok(false)) {
                std::thread::park_timeout(EVERY);
            }
            // A rank that leaves before it was its turn to look says so first: the others may have to know why they leave.
            if over.load(Ordering::Relaxed) && request.flag.load(Ordering::SeqCst) {
                let _ = pass_on(&mut store, &request);
            }
        };
        let thread = std::thread::Builder::new().name("preemption".into()).spawn(work)?;
        Ok(Preemption { ends, thread: Some(thread) })
    }
}

impl Drop for Preemption {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// Tells the others of this rank's request, or this rank of theirs; gives whether there is one.
fn pass_on(store: &mut Client, request: &StopRequest) -> Result<bool, crate::rendezvous::store::StoreError> {
    if request.flag.load(Ordering::SeqCst) {
        store.set(KEY, request.signal().to_string().as_bytes())?;
        // What was set is answered by nobody; this waits until the store has taken it.
        store.has(KEY)?;
        return Ok(true);
    }
    if !store.has(KEY)? {
        return Ok(false);
    }
    let signal = String::from_utf8(store.get(KEY, EVERY)?).ok().and_then(|text| text.parse().ok());
    // What this rank was told itself stays.
    if request.signal() == 0 {
        request.signal.store(signal.unwrap_or(0), Ordering::SeqCst);
    }
    request.flag.store(true, Ordering::SeqCst);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::testing::{client, server};
    use std::io::{Read, Write};
    use std::time::Instant;

    #[test]
    fn a_request_reaches_all_ranks_with_its_signal() {
        let server = server();
        let port = server.address().port();
        let ranks: Vec<(StopRequest, Preemption)> = (0..3)
            .map(|_| {
                let request = StopRequest::default();
                (request.clone(), Preemption::watch(client(port, "test/"), request).unwrap())
            })
            .collect();
        ranks[1].0.signal.store(10, Ordering::SeqCst);
        ranks[1].0.flag.store(true, Ordering::SeqCst);
        let start = Instant::now();
        while !ranks.iter().all(|(request, _)| request.flag.load(Ordering::SeqCst)) {
            assert!(start.elapsed() < Duration::from_secs(20), "the others hear nothing");
            std::thread::yield_now();
        }
        assert!(ranks.iter().all(|(request, _)| request.signal() == 10));
        // A batch system that sends another one later.
        ranks[1].0.user_signal.store(12, Ordering::SeqCst);
        ranks[1].0.signal.store(15, Ordering::SeqCst);
        assert_eq!(ranks[1].0.signal(), 12);
    }

    /// A rank may save and leave sooner than it looks at the store again.
    #[test]
    fn a_request_is_passed_on_by_a_rank_that_leaves_at_once() {
        let server = server();
        let port = server.address().port();
        let request = StopRequest::default();
        let watch = Preemption::watch(client(port, "test/"), request.clone()).unwrap();
        // Most often the first look is over now, and the next one far; it must be passed on in any case.
        std::thread::sleep(EVERY / 4);
        request.signal.store(10, Ordering::SeqCst);
        request.flag.store(true, Ordering::SeqCst);
        drop(watch);
        assert_eq!(client(port, "test/").get(KEY, Duration::from_secs(10)).unwrap(), b"10");
    }

    /// It would hold up the rank's end.
    #[test]
    fn a_store_that_does_not_answer_is_not_waited_for_long() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let (asked, is_asked) = std::sync::mpsc::channel();
        let store = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 10];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(&hello[6..]).unwrap();
            stream.read_exact(&mut [0; 1]).unwrap();
            asked.send(()).unwrap();
            let _ = wait.recv();
        });
        let watch = Preemption::watch(client(port, "test/"), StopRequest::default()).unwrap();
        is_asked.recv().unwrap();
        let start = Instant::now();
        drop(watch);
        assert!(start.elapsed() < ANSWER + Duration::from_secs(8), "{:?}", start.elapsed());
        drop(over);
        store.join().unwrap();
    }

    #[test]
    fn a_store_that_goes_away_ends_the_watch_and_requests_nothing() {
        let server = server();
        let port = server.address().port();
        let request = StopRequest::default();
        let watch = Preemption::watch(client(port, "test/"), request.clone()).unwrap();
        drop(server);
        // By itself: when it is dropped it would end in any case.
        let start = Instant::now();
        while !watch.thread.as_ref().unwrap().is_finished() {
            assert!(start.elapsed() < Duration::from_secs(20), "it watches a store that is gone");
            std::thread::yield_now();
        }
        assert!(!request.flag.load(Ordering::SeqCst));
    }
}
