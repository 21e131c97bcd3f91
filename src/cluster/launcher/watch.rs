//! The thread that looks into the store while the launcher looks after its ranks: a store that does not answer holds up only this.

use super::Job;
use super::ends::LostNode;
use super::inbox::{Doorbell, Event};
use super::meeting::TICK;
use crate::rendezvous::store::{Client, StoreError};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Beats of a launcher are this far apart.
const BEAT: Duration = Duration::from_millis(500);

/// Ends the thread when dropped.
pub(super) struct Watch {
    closing: Arc<AtomicBool>,
}

impl Watch {
    /// Beats for this node, and rings for whatever happens elsewhere. `hosts` are the names of the nodes that are watched.
    pub(super) fn start(client: Client, job: &Job, hosts: Vec<String>, doorbell: Doorbell) -> io::Result<Watch> {
        let closing = Arc::new(AtomicBool::new(false));
        let (node, nodes, silence) = (job.node, job.nodes, job.timing.silence);
        let answers = Arc::new(AtomicU64::new(0));
        let lead = hosts.first().cloned().unwrap_or_default();
        if node != 0 {
            let (doorbell, lead) = (doorbell.clone(), lead.clone());
            let (closing, answers) = (Arc::clone(&closing), Arc::clone(&answers));
            let look = move || watch_store(&closing, &answers, silence, &lead, &doorbell);
            std::thread::Builder::new().name("watch-store".into()).spawn(look)?;
        }
        let theirs = Arc::clone(&closing);
        let watch = move || {
            let others =
                if node == 0 { (1..nodes).map(|other| Other::new(other, &hosts)).collect() } else { Vec::new() };
            let mut watcher =
                Watcher { client, node, silence, others, doorbell, failing: 0, beat: None, leaving: false };
            while !theirs.load(Ordering::SeqCst) {
                if let Err(error) = watcher.look() {
                    let lost = LostNode { node: 0, host: lead, why: error.to_string() };
                    return watcher.doorbell.ring(Event::Lost(lost));
                }
                answers.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(TICK);
            }
        };
        std::thread::Builder::new().name("watch".into()).spawn(watch)?;
        Ok(Watch { closing })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
    }
}

/// Tells of a store that no longer answers: a request to a machine that is off waits for longer than anyone wants to.
///
/// Silence is counted in looks, not read from the clock: a process that was stopped itself has not listened.
fn watch_store(closing: &AtomicBool, answers: &AtomicU64, silence: Duration, lead: &str, doorbell: &Doorbell) {
    let (mut known, mut silent) = (0, Duration::ZERO);
    while !closing.load(Ordering::SeqCst) {
        std::thread::sleep(TICK);
        let now = answers.load(Ordering::SeqCst);
        silent = if now == known { silent + TICK } else { Duration::ZERO };
        known = now;
        if silent >= silence {
            let why = format!("its store has not answered for {} s", silence.as_secs());
            return doorbell.ring(Event::Lost(LostNode { node: 0, host: lead.to_string(), why }));
        }
    }
}

/// Another node, as node 0 sees it.
struct Other {
    node: usize,
    host: String,
    beat: i64,
    /// How long that has been its beat, counted in looks.
    silent: Duration,
    is_lost: bool,
}

impl Other {
    fn new(node: usize, hosts: &[String]) -> Other {
        let host = hosts.get(node).cloned().unwrap_or_default();
        Other { node, host, beat: 0, silent: Duration::ZERO, is_lost: false }
    }
}

struct Watcher {
    client: Client,
    node: usize,
    silence: Duration,
    others: Vec<Other>,
    doorbell: Doorbell,
    /// The attempt whose failure is not known yet.
    failing: u32,
    /// When this node last beat.
    beat: Option<Instant>,
    leaving: bool,
}

impl Watcher {
    fn look(&mut self) -> Result<(), StoreError> {
        if self.beat.is_none_or(|at| at.elapsed() >= BEAT) {
            self.beat = Some(Instant::now());
            self.client.add(&format!("beat/{}", self.node), 1)?;
            for other in self.others.iter_mut().filter(|other| !other.is_lost) {
                let beat = self.client.add(&format!("beat/{}", other.node), 0)?;
                other.silent = if beat == other.beat { other.silent + BEAT } else { Duration::ZERO };
                other.beat = beat;
                if other.silent >= self.silence {
                    other.is_lost = true;
                    let why = format!("no sign of its launcher for {} s", self.silence.as_secs());
                    self.doorbell.ring(Event::Lost(LostNode { node: other.node, host: other.host.clone(), why }));
                }
            }
        }
        // Attempts fail one after another: the next one can fail only after this one is over.
        while self.client.has(&format!("failing/{}", self.failing))? {
            self.doorbell.ring(Event::Failing(self.failing));
            self.failing += 1;
        }
        if !self.leaving && self.client.has("leaving")? {
            self.leaving = true;
            let value = self.client.get("leaving", self.silence)?;
            let signal = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
            self.doorbell.ring(Event::Leaving(signal.unwrap_or(signal_hook::consts::SIGTERM)));
        }
        Ok(())
    }
}
