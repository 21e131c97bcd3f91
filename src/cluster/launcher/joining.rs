//! Before the run begins: each launcher claims its node, may leave again and come again, until node 0 sees all of them alive.

use super::LaunchError;
use super::inbox::Inbox;
use super::meeting::{Meeting, NodeInfo, TICK, decode, encode};
use crate::rendezvous::MAX_RANKS;
use std::time::{Duration, Instant};

/// The key of a node's claim. It is never deleted: a value can be compared and set at once.
fn claim(node: usize) -> String {
    format!("node/{node}")
}

impl Meeting<'_> {
    /// Claims this node. A claim that nobody keeps up is taken over as long as the run has not begun: its launcher was killed, and this is
    /// the one that came in its place.
    pub(super) fn announce(&mut self, me: &NodeInfo, inbox: &mut Inbox) -> Result<(), LaunchError> {
        let node = self.job.node;
        let (key, mine) = (claim(node), encode(me));
        let mut free = Vec::new();
        loop {
            let there = self.compare_set(&key, &free, &mine)?;
            if there == mine {
                return Ok(());
            }
            if !there.is_empty() {
                let other: NodeInfo = decode(&key, &there)?;
                if !self.is_abandoned(node, inbox)? {
                    return Err(LaunchError::Twice { node, other: other.host });
                }
            }
            free = there;
        }
    }

    /// Whether the launcher that has claimed a node gives no sign of life for as long as it may be silent, and no run has begun with it.
    fn is_abandoned(&mut self, node: usize, inbox: &mut Inbox) -> Result<bool, LaunchError> {
        let mut life = Life { beats: self.beats(node)?, silent: Duration::ZERO };
        while life.silent < self.job.timing.silence {
            wait_or_stop(inbox)?;
            if self.has("order/0")? || life.is_renewed(self.beats(node)?) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until all nodes are there, and live; they must have been started alike.
    pub(super) fn all_nodes(&mut self, inbox: &mut Inbox) -> Result<Vec<NodeInfo>, LaunchError> {
        let (start, count, after) = (Instant::now(), self.job.nodes, self.job.patience);
        let mut lives = vec![Life::default(); count];
        loop {
            let (mut nodes, mut missing) = (Vec::new(), Vec::new());
            for (node, life) in lives.iter_mut().enumerate() {
                let claimant = self.claimant(node)?;
                if !life.is_renewed(self.beats(node)?) && claimant.is_none() {
                    life.silent = Duration::ZERO;
                }
                match claimant {
                    // This one beats when all are there.
                    Some(info) if node == 0 || life.silent < self.job.timing.silence => nodes.push(info),
                    _ => missing.push(node),
                }
            }
            if missing.is_empty() {
                return fit_together(nodes);
            }
            if start.elapsed() >= after {
                return Err(LaunchError::NodesMissing { missing, count, after });
            }
            wait_or_stop(inbox)?;
        }
    }

    /// Before the run has begun a signal is for this launcher alone: it gives its claim back, so that another can come in its place.
    pub(super) fn leave_if_asked(&mut self, inbox: &Inbox) -> Result<(), LaunchError> {
        let Some(signal) = inbox.stop else { return Ok(()) };
        let (key, mine) = (claim(self.job.node), encode(&self.nodes[0]));
        self.compare_set(&key, &mine, b"")?;
        // It may have begun meanwhile, with this node.
        match self.has("order/0")? && self.compare_set(&key, b"", &mine)? == mine {
            true => Ok(()),
            false => Err(LaunchError::Stopped(signal)),
        }
    }

    fn compare_set(&mut self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, LaunchError> {
        self.ask(desired.to_vec(), |client| client.compare_set(key, expected, desired))
    }

    /// How often a node's launcher has given a sign of life.
    fn beats(&mut self, node: usize) -> Result<i64, LaunchError> {
        self.ask(0, |client| client.add(&format!("beat/{node}"), 0))
    }

    /// Who has claimed a node, if anyone.
    pub(super) fn claimant(&mut self, node: usize) -> Result<Option<NodeInfo>, LaunchError> {
        let key = claim(node);
        let value = if self.has(&key)? { self.value(&key)? } else { Vec::new() };
        if value.is_empty() { Ok(None) } else { decode(&key, &value).map(Some) }
    }
}

/// Nodes that were started alike, and no more ranks than there may be.
fn fit_together(nodes: Vec<NodeInfo>) -> Result<Vec<NodeInfo>, LaunchError> {
    let ours = &nodes[0];
    for (node, info) in nodes.iter().enumerate() {
        let (theirs, nodes) = (info.nodes.to_string(), ours.nodes.to_string());
        for (what, theirs, ours) in [("version", &info.version, &ours.version), ("--nnodes", &theirs, &nodes)] {
            if theirs != ours {
                let (host, theirs, ours) = (info.host.clone(), theirs.clone(), ours.clone());
                return Err(LaunchError::Disagree { node, host, what, theirs, ours });
            }
        }
    }
    let ranks = nodes.iter().fold(0usize, |ranks, node| ranks.saturating_add(node.ranks));
    if ranks > MAX_RANKS { Err(LaunchError::TooMany { ranks, most: MAX_RANKS }) } else { Ok(nodes) }
}

/// Signs of life of another launcher.
#[derive(Clone, Copy, Default)]
struct Life {
    beats: i64,
    /// How long there was no new one, counted in looks: a process that was stopped itself has not looked.
    silent: Duration,
}

impl Life {
    /// Takes note of another look; gives whether there is a new sign.
    fn is_renewed(&mut self, beats: i64) -> bool {
        let is_new = beats != self.beats;
        self.silent = if is_new { Duration::ZERO } else { self.silent + TICK };
        self.beats = beats;
        is_new
    }
}

fn wait_or_stop(inbox: &mut Inbox) -> Result<(), LaunchError> {
    inbox.wait(TICK);
    match inbox.stop {
        Some(signal) => Err(LaunchError::Stopped(signal)),
        None => Ok(()),
    }
}
