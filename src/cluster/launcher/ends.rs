//! How ranks end.

use serde::{Deserialize, Serialize};

/// A place for a rank: on which node, and which of that node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The node's number, from 0.
    pub node: usize,
    /// The place's number on the node, from 0: the device, where ranks have devices.
    pub slot: usize,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// By itself, with this code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It never began, and why.
    NotStarted(String),
}

/// Whether the launcher had told a rank to end before it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// No.
    No,
    /// Because someone wants the run to leave.
    ToLeave,
    /// Because another rank failed.
    ByFailure,
}

/// The end of a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankEnd {
    /// Its number.
    pub rank: usize,
    /// Where it ran.
    pub place: Place,
    /// The node's name.
    pub host: String,
    /// How.
    pub how: How,
    /// Whether it was told to.
    pub asked: Asked,
    /// When, in seconds since 1970.
    pub at: f64,
    /// What it said of it.
    pub message: Option<String>,
}

/// A node whose launcher is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostNode {
    /// Its number.
    pub node: usize,
    /// Its name.
    pub host: String,
    /// How that was noticed.
    pub why: String,
}

/// What an exit code of a rank means to the launcher, which knows nothing of what the ranks do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It did what it was to do.
    Done,
    /// It was told to leave, and its state is saved.
    Left,
    /// It ended because another did.
    PeerLost,
    /// It failed, and would again: what failed.
    Final(&'static str),
    /// It failed and may do better the next time: what failed.
    Failed(&'static str),
}

/// What an end is among others, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// It failed by itself.
    Failure,
    /// It ended because another did.
    PeerLost,
    /// It ended because it was told to.
    PutDown,
    /// It was told to leave by someone else, and has saved its state.
    Left,
    /// It did what it was to do.
    Done,
}

impl RankEnd {
    /// What the end is, by what its exit code means.
    pub(super) fn class(&self, meaning: fn(i32) -> Meaning) -> Class {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let was_asked = self.asked != Asked::No;
        match self.how {
            How::Signal(_) if was_asked => Class::PutDown,
            How::Exit(code) if was_asked && [128 + SIGINT, 128 + SIGTERM].contains(&code) => Class::PutDown,
            How::Exit(code) => match meaning(code) {
                Meaning::Done => Class::Done,
                // Those who are left over by a failure save and leave, too; that does not make it anyone's wish.
                Meaning::Left if self.asked == Asked::ByFailure => Class::PutDown,
                Meaning::Left => Class::Left,
                Meaning::PeerLost => Class::PeerLost,
                Meaning::Final(_) | Meaning::Failed(_) => Class::Failure,
            },
            How::Signal(_) | How::NotStarted(_) => Class::Failure,
        }
    }

    /// What a shell would show: the exit code, or 128 and the signal.
    pub(super) fn code(&self) -> u8 {
        match self.how {
            How::Exit(code) => code as u8,
            How::Signal(signal) => 128u8.saturating_add(signal as u8),
            How::NotStarted(_) => 1,
        }
    }
}
