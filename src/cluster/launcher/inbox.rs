//! What reaches a launcher while it works: signals, and news of other nodes.

use super::ends::LostNode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// A piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A signal came to this process.
    Signal(i32),
    /// Another launcher was told to leave, by this signal.
    Leaving(i32),
    /// A rank of an attempt failed elsewhere.
    Failing(u32),
    /// Another launcher is gone.
    Lost(LostNode),
}

/// Brings news into an [`Inbox`], from any thread.
#[derive(Clone, Debug)]
pub struct Doorbell(Sender<Event>);

impl Doorbell {
    /// A signal came.
    pub fn signal(&self, signal: i32) {
        self.ring(Event::Signal(signal));
    }

    pub(super) fn ring(&self, event: Event) {
        // A launcher that is done has nothing more to hear.
        let _ = self.0.send(event);
    }
}

/// What a launcher has heard so far.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<Event>,
    doorbell: Doorbell,
    /// The signal by which someone wants the run to leave.
    pub(super) stop: Option<i32>,
    /// Whether it came to another launcher.
    pub(super) stop_is_theirs: bool,
    /// Someone wants it to end at once.
    pub(super) kill: bool,
    /// The last attempt that failed elsewhere.
    pub(super) failing: Option<u32>,
    /// Launchers that are gone, in the order in which that was noticed.
    pub(super) lost: Vec<LostNode>,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Inbox {
        let (sender, receiver) = channel();
        let doorbell = Doorbell(sender);
        let (stop, stop_is_theirs, kill, failing, lost) = (None, false, false, None, Vec::new());
        Inbox { receiver, doorbell, stop, stop_is_theirs, kill, failing, lost }
    }

    /// What brings news into it.
    pub fn doorbell(&self) -> Doorbell {
        self.doorbell.clone()
    }

    /// Takes in what has come, or waits for something to come, but no longer than that.
    pub(super) fn wait(&mut self, at_most: Duration) {
        let mut next = self.receiver.recv_timeout(at_most);
        while let Ok(event) = next {
            self.take(event);
            next = self.receiver.try_recv().map_err(|_| RecvTimeoutError::Timeout);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Signal(signal) => {
                // Batch systems send SIGTERM more than once; only a person at the keyboard means it the second time.
                self.kill |= self.stop.is_some() && !self.stop_is_theirs && signal == signal_hook::consts::SIGINT;
                if self.stop.is_none() || self.stop_is_theirs {
                    (self.stop, self.stop_is_theirs) = (self.stop.or(Some(signal)), false);
                }
            }
            Event::Leaving(signal) if self.stop.is_none() => (self.stop, self.stop_is_theirs) = (Some(signal), true),
            Event::Leaving(_) => {}
            Event::Failing(attempt) => self.failing = self.failing.max(Some(attempt)),
            Event::Lost(lost) if self.lost.iter().all(|known| known.node != lost.node) => self.lost.push(lost),
            Event::Lost(_) => {}
        }
    }
}

impl Default for Inbox {
    fn default() -> Inbox {
        Inbox::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::{SIGINT, SIGTERM};

    #[test]
    fn which_signals_mean_at_once() {
        use Event::{Leaving, Signal};
        for (events, stop, kill) in [
            (vec![], None, false),
            (vec![Signal(SIGINT)], Some(SIGINT), false),
            (vec![Signal(SIGINT), Signal(SIGINT)], Some(SIGINT), true),
            (vec![Signal(SIGTERM), Signal(SIGTERM)], Some(SIGTERM), false),
            (vec![Signal(SIGTERM), Signal(SIGINT)], Some(SIGTERM), true),
            (vec![Leaving(SIGTERM), Signal(SIGINT)], Some(SIGTERM), false),
            (vec![Leaving(SIGTERM), Signal(SIGINT), Signal(SIGINT)], Some(SIGTERM), true),
            (vec![Signal(SIGINT), Leaving(SIGTERM)], Some(SIGINT), false),
        ] {
            let mut inbox = Inbox::new();
            events.iter().for_each(|event| inbox.doorbell().ring(event.clone()));
            inbox.wait(Duration::ZERO);
            assert_eq!((inbox.stop, inbox.kill), (stop, kill), "{events:?}");
        }
    }

    #[test]
    fn a_node_is_lost_once() {
        let mut inbox = Inbox::new();
        for (node, why) in [(1, "silent"), (2, "silent"), (1, "again")] {
            inbox.doorbell().ring(Event::Lost(LostNode { node, host: "h".into(), why: why.into() }));
        }
        inbox.wait(Duration::ZERO);
        assert_eq!(inbox.lost.iter().map(|lost| lost.node).collect::<Vec<_>>(), [1, 2]);
    }
}
