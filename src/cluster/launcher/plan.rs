//! Where ranks run, and what the end of an attempt means: pure functions.

use super::cause::{Cause, root_cause};
use super::ends::{Class, How, LostNode, Meaning, Place, RankEnd};

/// What a run is allowed.
#[derive(Clone, Copy)]
pub(super) struct Limits<'a> {
    /// How often the ranks are started again.
    pub max_restarts: u32,
    /// The fewest ranks that the run goes on with, if it may do so with fewer than it began with.
    pub min_ranks: Option<usize>,
    /// Which numbers of ranks can share the work.
    pub allowed: &'a dyn Fn(usize) -> bool,
    /// What exit codes mean.
    pub meaning: fn(i32) -> Meaning,
    /// The exit code where a node is gone.
    pub peer_lost: u8,
}

/// What is to be done after an attempt.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Decision {
    /// Start again, in these places, and say why.
    Restart { places: Vec<Place>, because: String },
    /// The run is over: the exit code, and what went wrong.
    Stop { code: u8, message: Option<String> },
}

/// The places that are left, and what is known of the attempts before.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct History {
    /// Places that may be used, those in use first: rank r of the present world is at place r.
    pub places: Vec<Place>,
    /// Number of ranks.
    pub world: usize,
    /// How often the ranks were started again.
    pub restarts: u32,
    /// Where the first rank failed the last time.
    pub failed_at: Option<Place>,
}

/// The largest number of ranks that is allowed and fits, at least `least`.
pub(super) fn largest(places: usize, least: usize, allowed: &dyn Fn(usize) -> bool) -> Option<usize> {
    (least.max(1)..=places).rev().find(|&world| allowed(world))
}

/// What the end of an attempt means. `stop` is the signal by which someone wanted the run to leave.
pub(super) fn decide(
    ends: &[RankEnd],
    lost: &[LostNode],
    stop: Option<i32>,
    history: &mut History,
    limits: &Limits,
) -> Decision {
    let cause = root_cause(ends, lost, limits.meaning);
    let left = ends.iter().find(|end| end.class(limits.meaning) == Class::Left);
    if stop.is_some() || left.is_some() {
        return leave(cause, left, stop, limits);
    }
    let Some(cause) = cause else { return Decision::Stop { code: 0, message: None } };
    let said = cause.describe(limits.meaning);
    let code = cause.code(limits);
    let stop = |why: &str| Decision::Stop { code, message: Some(format!("{said}{why}")) };
    if is_final(&cause, limits.meaning) {
        // Who waits for restarts wants to know why there is none.
        return stop(if limits.max_restarts > 0 { "; not started again: the same would come again" } else { "" });
    }
    let before = history.world;
    let out = give_up(&cause, lost, history, limits);
    if history.restarts >= limits.max_restarts {
        return stop(match limits.max_restarts {
            0 => "; --max-restarts N would start the ranks again",
            _ => "; all restarts are used up (--max-restarts)",
        });
    }
    let Some(world) =
        largest(history.places.len().min(history.world), limits.min_ranks.unwrap_or(before), limits.allowed)
    else {
        return stop("; too few places are left for the ranks (--min-ranks would go on with fewer)");
    };
    history.restarts += 1;
    history.world = world;
    let fewer = match (out, world) {
        (Some(out), world) if world < before => {
            format!(" with {world} ranks in place of {before}, without {out}")
        }
        (Some(out), world) => format!(" with {world} ranks, without {out}"),
        (None, world) => format!(" with {world} ranks"),
    };
    let because = format!("{said}; starting again{fewer} (restart {} of {})", history.restarts, limits.max_restarts);
    Decision::Restart { places: history.places[..world].to_vec(), because }
}

/// Takes places away that are not to be used again, and says which.
///
/// Those of a node that is gone; and one where the first rank failed twice in a row, if fewer ranks may go on.
fn give_up(cause: &Cause, lost: &[LostNode], history: &mut History, limits: &Limits) -> Option<String> {
    if !lost.is_empty() {
        history.places.retain(|place| lost.iter().all(|lost| lost.node != place.node));
        let names: Vec<String> = lost.iter().map(|lost| format!("node {} ({})", lost.node, lost.host)).collect();
        return Some(names.join(" and "));
    }
    let failed_at = match cause {
        Cause::Rank(end) if end.class(limits.meaning) == Class::Failure => Some(end.place),
        _ => None,
    };
    let again = failed_at.is_some() && failed_at == history.failed_at;
    history.failed_at = failed_at;
    let (true, Some(least), Some(bad)) = (again, limits.min_ranks, failed_at) else { return None };
    largest(history.places.len().saturating_sub(1).min(history.world), least, limits.allowed)?;
    history.places.retain(|place| *place != bad);
    Some(format!("place {} of node {}, where the first rank failed twice in a row", bad.slot, bad.node))
}

/// Someone wanted the run to leave: nothing is started again.
fn leave(cause: Option<Cause>, left: Option<&RankEnd>, stop: Option<i32>, limits: &Limits) -> Decision {
    let describe = |cause: &Cause| Some(cause.describe(limits.meaning));
    match (cause, left) {
        // What fails while all leave may mean that nothing was saved; peers that are missed then do not.
        (Some(cause), _) if cause.class(limits.meaning) == Class::Failure => {
            Decision::Stop { code: cause.code(limits), message: describe(&cause) }
        }
        (_, Some(left)) => Decision::Stop { code: left.code(), message: None },
        (Some(cause), None) => match (cause.class(limits.meaning), stop) {
            (Class::PutDown, Some(signal)) => {
                let message = match cause {
                    Cause::Rank(RankEnd { how: How::Signal(signal_hook::consts::SIGKILL), .. }) => {
                        Some(format!("{}: it did not leave in time (--grace)", cause.describe(limits.meaning)))
                    }
                    _ => None,
                };
                Decision::Stop { code: 128u8.saturating_add(signal as u8), message }
            }
            _ => Decision::Stop { code: cause.code(limits), message: describe(&cause) },
        },
        (None, None) => Decision::Stop { code: 0, message: None },
    }
}

fn is_final(cause: &Cause, meaning: fn(i32) -> Meaning) -> bool {
    match cause {
        Cause::Rank(RankEnd { how: How::Exit(code), .. }) => matches!(meaning(*code), Meaning::Final(_)),
        Cause::Rank(RankEnd { how: How::NotStarted(_), .. }) => true,
        Cause::Rank(_) | Cause::Node(_) => false,
    }
}

impl Cause<'_> {
    fn class(&self, meaning: fn(i32) -> Meaning) -> Class {
        match self {
            Cause::Rank(end) => end.class(meaning),
            Cause::Node(_) => Class::PeerLost,
        }
    }

    /// The exit code of the run.
    fn code(&self, limits: &Limits) -> u8 {
        match self {
            Cause::Rank(end) => end.code(),
            Cause::Node(_) => limits.peer_lost,
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
