//! The ranks of one node, from the start of an attempt to the end of the last of them.

use super::Timing;
use super::child::{Attempt, Site};
use super::ends::{Class, Meaning, RankEnd};
use super::inbox::Inbox;
use super::meeting::Meeting;
use super::winding::{Seen, Winding};
use std::time::{Duration, Instant};

/// How often ranks are looked at; signals and news are heard at once.
const POLL: Duration = Duration::from_millis(20);

/// Starts the ranks and returns when all of them have ended.
pub(super) fn run(
    attempt: &Attempt,
    site: &Site,
    timing: &Timing,
    meaning: fn(i32) -> Meaning,
    meeting: &mut Meeting,
    inbox: &mut Inbox,
) -> Vec<RankEnd> {
    let (mut ranks, mut ends) = site.start(attempt);
    let mut winding = Winding::new(timing.settle, timing.grace);
    loop {
        ranks.retain_mut(|rank| match rank.poll() {
            Some(end) => {
                ends.push(end);
                false
            }
            None => true,
        });
        let has = |class: Class| ends.iter().any(|end| end.class(meaning) == class);
        let is_ours = |node: usize| node == 0 || attempt.places.iter().any(|place| place.node == node);
        let failed = has(Class::Failure) || has(Class::PeerLost) || inbox.lost.iter().any(|lost| is_ours(lost.node));
        meeting.tell(attempt.number, failed, inbox);
        if ranks.is_empty() {
            return ends;
        }
        let failed = failed || inbox.failing >= Some(attempt.number);
        let seen = Seen { failed, left: has(Class::Left), stop: inbox.stop, kill: inbox.kill };
        if let Some(act) = winding.next(Instant::now(), &seen) {
            ranks.iter_mut().for_each(|rank| rank.act(act));
        }
        inbox.wait(POLL);
    }
}
