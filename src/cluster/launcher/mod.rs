//! `ddpm-dist --ranks N`: starts the ranks of this node, watches them, and starts them again if that may help.
//!
//! The launcher knows nothing of what its ranks do: a rank is a command that ends with an exit code, and what exit codes mean is given to
//! it. Its promises:
//!
//! - The store in which ranks meet is there before any of them, and lasts as long as the run.
//! - When a rank fails, all end, and everyone is told of the *first cause*: which rank, where, how, when, and what it said.
//! - Where it may help, all ranks start again; where a place fails twice in a row, or a node is gone, with fewer ranks if that was allowed.
//! - A signal reaches every rank of the run, once, and gives it time to save.
//! - No rank outlives its launcher, however that ends ([`stay_with_launcher`]).
//!
//! On several nodes each has a launcher, and that of node 0 decides (`meeting`). Decisions (`plan`, `cause`, `winding`) are pure
//! functions; processes (`child`), the store and the clock stand apart.

mod attempt;
mod cause;
mod child;
mod ends;
mod error;
pub mod error_file;
mod inbox;
mod joining;
mod meeting;
mod parent;
mod place;
mod plan;
mod voice;
mod watch;
mod winding;

#[cfg(test)]
mod tests;

pub use child::SLOT;
pub use ends::Meaning;
pub use error::LaunchError;
pub use inbox::{Doorbell, Inbox};
pub use parent::stay_with_launcher;
pub use voice::Voice;

use child::{Attempt, Folder, Site};
use ends::Place;
use meeting::{Meeting, Order};
use plan::{Decision, History, Limits, decide, largest};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What a rank is.
#[derive(Clone, Debug)]
pub struct Command {
    /// The program.
    pub program: PathBuf,
    /// What it is called with.
    pub arguments: Vec<OsString>,
}

/// What exit codes mean.
#[derive(Clone, Copy, Debug)]
pub struct Codes {
    /// Those of ranks.
    pub meaning: fn(i32) -> Meaning,
    /// The launcher's own, where a node is gone.
    pub peer_lost: u8,
    /// The launcher's own, for its errors.
    pub of_error: fn(&LaunchError) -> u8,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Ranks that a failure leaves over, until they are told to end: they notice by themselves and say more than one that is told.
    pub settle: Duration,
    /// Ranks that are told to end, until they are killed.
    pub grace: Duration,
    /// Launchers of other nodes, until one that gives no sign counts as gone.
    pub silence: Duration,
}

/// What a launcher is to do.
#[derive(Clone, Debug)]
pub struct Job {
    /// What each rank runs.
    pub command: Command,
    /// Places for ranks on this node.
    pub ranks: usize,
    /// This node's number, from 0.
    pub node: usize,
    /// Number of nodes.
    pub nodes: usize,
    /// Host and port where nodes meet: node 0 listens there. Several nodes need it.
    pub meet: Option<(String, u16)>,
    /// The address of this node that the others are to use, if they are not to use all.
    pub interface: Option<IpAddr>,
    /// How long nodes wait for each other at the start.
    pub patience: Duration,
    /// How often the ranks may be started again.
    pub max_restarts: u32,
    /// The fewest ranks to go on with, if fewer than all will do.
    pub min_ranks: Option<usize>,
    /// Where to keep what ranks print.
    pub log_dir: Option<PathBuf>,
    /// How long things may take.
    pub timing: Timing,
    /// What exit codes mean.
    pub codes: Codes,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code of the launcher: that of the first cause.
    pub code: u8,
    /// What went wrong.
    pub message: Option<String>,
}

/// Starts ranks, and returns when the run is over. To be called from the first thread of the process: ranks are tied to the thread that
/// starts them. `allowed` says which numbers of ranks can share the work; node 0's counts.
///
/// # Errors
/// What keeps ranks from being started: a folder, a port, nodes that are missing or do not fit together, a number of ranks that does not.
pub fn launch(
    job: &Job,
    allowed: &dyn Fn(usize) -> bool,
    voice: &Voice,
    inbox: &mut Inbox,
) -> Result<Outcome, LaunchError> {
    let log_dir = job.log_dir.as_deref();
    let folder = Folder::create(log_dir).map_err(|(path, source)| LaunchError::Folder { path, source })?;
    let started = child::now() as u64;
    let mut meeting = Meeting::open(job, voice, inbox)?;
    let host = meeting.nodes[0].host.clone();
    if job.node != 0 {
        let site = Site { node: job.node, host: &host, command: &job.command, folder: &folder, voice, started };
        return follow(job, &site, &mut meeting, inbox);
    }
    let site = Site { node: 0, host: &host, command: &job.command, folder: &folder, voice, started };
    let limits = Limits {
        max_restarts: job.max_restarts,
        min_ranks: job.min_ranks,
        allowed,
        meaning: job.codes.meaning,
        peer_lost: job.codes.peer_lost,
    };
    lead(job, &site, &limits, &mut meeting, inbox)
}

/// Node 0: decides, and does its own part.
fn lead(
    job: &Job,
    site: &Site,
    limits: &Limits,
    meeting: &mut Meeting,
    inbox: &mut Inbox,
) -> Result<Outcome, LaunchError> {
    let run_id = crate::files::unique_id();
    let mut history = match begin(meeting, limits) {
        Ok(history) => history,
        Err(error) => {
            let stop = Order::Stop { code: (job.codes.of_error)(&error), message: Some(error.to_string()) };
            meeting.stop(0, &stop, inbox);
            return Err(error);
        }
    };
    let wanted: usize = meeting.nodes.iter().map(|node| node.ranks).sum();
    if history.world < wanted {
        site.voice.say(&format!("{} ranks in place of {wanted}: more cannot share the work", history.world));
    }
    let mut places = history.places[..history.world].to_vec();
    let mut because = None;
    let mut number = 0;
    loop {
        let (run_id, host, port) = (run_id.clone(), meeting.host_for_ranks(), meeting.port());
        let attempt = Attempt { number, run_id, places, host, port };
        meeting.publish(number, &Order::Start { attempt: attempt.clone(), because })?;
        let mut ends = attempt::run(&attempt, site, &job.timing, limits.meaning, meeting, inbox);
        ends.extend(meeting.gather(number, inbox)?);

        let is_used = |node: usize| attempt.places.iter().any(|place| place.node == node);
        let lost: Vec<_> = inbox.lost.iter().filter(|lost| is_used(lost.node)).cloned().collect();
        history.places.retain(|place| inbox.lost.iter().all(|lost| lost.node != place.node));
        match decide(&ends, &lost, inbox.stop, &mut history, limits) {
            Decision::Restart { places: next, because: why } => {
                site.voice.alarm(&why);
                (places, because) = (next, Some(why));
                number += 1;
            }
            Decision::Stop { code, message } => {
                meeting.stop(number + 1, &Order::Stop { code, message: message.clone() }, inbox);
                return Ok(Outcome { code, message });
            }
        }
    }
}

/// The places of all nodes, and with how many ranks to begin.
fn begin(meeting: &Meeting, limits: &Limits) -> Result<History, LaunchError> {
    let of_node = |(node, ranks): (usize, usize)| (0..ranks).map(move |slot| Place { node, slot });
    let places: Vec<Place> = meeting.nodes.iter().map(|node| node.ranks).enumerate().flat_map(of_node).collect();
    let ranks = places.len();
    if let Some(least) = limits.min_ranks.filter(|least| *least > ranks) {
        return Err(LaunchError::TooFew { least, ranks });
    }
    let world = largest(ranks, limits.min_ranks.unwrap_or(ranks), limits.allowed).ok_or_else(|| {
        let fits = largest(ranks, 1, limits.allowed);
        LaunchError::NotAllowed { ranks, fits }
    })?;
    Ok(History { places, world, restarts: 0, failed_at: None })
}

/// Another node: does what node 0 decides.
fn follow(job: &Job, site: &Site, meeting: &mut Meeting, inbox: &mut Inbox) -> Result<Outcome, LaunchError> {
    let mut number = 0;
    loop {
        match meeting.order(number, inbox)? {
            Order::Stop { code, message } => return Ok(Outcome { code, message }),
            Order::Start { attempt, because } => {
                if let Some(because) = because {
                    site.voice.alarm(&because);
                }
                let ends = attempt::run(&attempt, site, &job.timing, job.codes.meaning, meeting, inbox);
                meeting.check_lead(inbox)?;
                meeting.report(number, &ends)?;
                number += 1;
            }
        }
    }
}
