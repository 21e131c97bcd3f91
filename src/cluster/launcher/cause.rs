//! Which of many ends was the cause of the others, and how to say it.

use crate::machine::utc;

use super::ends::{Asked, Class, How, LostNode, Meaning, RankEnd};

/// What ended an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cause<'a> {
    Rank(&'a RankEnd),
    Node(&'a LostNode),
}

/// The first cause, if anything went wrong.
///
/// The first rank that failed by itself, whatever others say; else a node that is gone, which takes its ranks along; else the first rank
/// that missed a peer, which names it; else the first that had to be put down. Ranks that went because another did are never the cause of
/// one that failed, even if they ended before it: a process that writes a core takes its time.
pub(super) fn root_cause<'a>(
    ends: &'a [RankEnd],
    lost: &'a [LostNode],
    meaning: fn(i32) -> Meaning,
) -> Option<Cause<'a>> {
    let first = |class: Class| {
        let of_class = ends.iter().filter(|end| end.class(meaning) == class);
        of_class.min_by(|a, b| a.at.total_cmp(&b.at).then(a.rank.cmp(&b.rank))).map(Cause::Rank)
    };
    first(Class::Failure)
        .or_else(|| lost.first().map(Cause::Node))
        .or_else(|| first(Class::PeerLost))
        .or_else(|| first(Class::PutDown))
}

impl Cause<'_> {
    /// The cause in plain words, without a full stop.
    pub(super) fn describe(&self, meaning: fn(i32) -> Meaning) -> String {
        let end = match self {
            Cause::Node(lost) => return format!("node {} ({}) is gone: {}", lost.node, lost.host, lost.why),
            Cause::Rank(end) => end,
        };
        let how = match &end.how {
            How::NotStarted(why) => format!("could not be started: {why}"),
            How::Signal(signal) => {
                let hint = if end.asked == Asked::No { hint(*signal) } else { " by this launcher" };
                format!("was ended by signal {signal} ({}){hint}", name(*signal))
            }
            How::Exit(code) => match meaning(*code) {
                Meaning::Final(words) | Meaning::Failed(words) => format!("ended with exit code {code} ({words})"),
                Meaning::PeerLost => format!("ended with exit code {code} (it missed another rank)"),
                Meaning::Done | Meaning::Left => format!("ended with exit code {code}"),
            },
        };
        let said = end.message.as_ref().map(|message| format!(": {}", message.trim_end())).unwrap_or_default();
        format!("rank {} (node {}, {}) {how} at {}{said}", end.rank, end.place.node, end.host, utc(end.at as u64))
    }
}

/// What often lies behind a signal.
fn hint(signal: i32) -> &'static str {
    use signal_hook::consts::*;
    match signal {
        SIGKILL => ", perhaps by the kernel for want of memory (`dmesg` tells) or by the batch system",
        SIGSEGV | SIGBUS | SIGILL | SIGFPE | SIGABRT | SIGTRAP | SIGSYS => ", a mistake of the program or of a library",
        SIGXCPU => ": its CPU time is used up",
        SIGTERM | SIGINT | SIGHUP | SIGUSR1 | SIGUSR2 => ", sent by someone else",
        _ => "",
    }
}

fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal without a name")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{end, meaning};
    use super::*;

    fn lost(node: usize) -> LostNode {
        LostNode { node, host: format!("n{node}"), why: "silent".into() }
    }

    #[test]
    fn the_first_cause() {
        let put_down = |rank, how, at| RankEnd { asked: Asked::ByFailure, ..end(rank, how, at) };
        let (kill, term) = (How::Signal(9), How::Signal(15));
        for (name, ends, gone, expected) in [
            ("nothing wrong", vec![end(0, How::Exit(0), 1.0), end(1, How::Exit(75), 2.0)], vec![], None),
            ("one of two", vec![end(0, How::Exit(0), 1.0), end(1, How::Exit(1), 2.0)], vec![], Some(1)),
            ("the earlier", vec![end(0, How::Exit(4), 2.0), end(1, kill.clone(), 1.0)], vec![], Some(1)),
            ("at once: the lower", vec![end(1, How::Exit(5), 1.0), end(0, How::Exit(5), 1.0)], vec![], Some(0)),
            ("peers first", vec![end(0, How::Exit(6), 1.0), end(1, kill.clone(), 2.0)], vec![], Some(1)),
            ("only peers", vec![end(0, How::Exit(6), 2.0), end(1, How::Exit(6), 1.0)], vec![], Some(1)),
            ("a hung rank", vec![end(0, How::Exit(6), 3.0), put_down(1, kill.clone(), 1.0)], vec![], Some(0)),
            ("put down only", vec![put_down(0, term.clone(), 3.0), end(1, How::Exit(0), 1.0)], vec![], Some(0)),
            ("left over ones save", vec![put_down(0, How::Exit(75), 1.0), end(1, kill, 2.0)], vec![], Some(1)),
            ("a node and its peers", vec![end(0, How::Exit(6), 1.0)], vec![lost(1)], Some(101)),
            ("a rank before its node", vec![end(0, How::Exit(1), 1.0)], vec![lost(1)], Some(0)),
        ] {
            let found = root_cause(&ends, &gone, meaning).map(|cause| match cause {
                Cause::Rank(end) => end.rank,
                Cause::Node(lost) => 100 + lost.node,
            });
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn causes_in_words() {
        let said = |end: &RankEnd| Cause::Rank(end).describe(meaning);
        let killed = said(&end(3, How::Signal(9), 1_769_903_999.0));
        assert_eq!(
            killed,
            "rank 3 (node 0, here) was ended by signal 9 (SIGKILL), perhaps by the kernel for want of memory (`dmesg` tells) or by the \
             batch system at 2026-01-31T23:59:59Z"
        );
        let told = RankEnd { message: Some("no such file\n".into()), ..end(1, How::Exit(3), 0.0) };
        assert_eq!(
            said(&told),
            "rank 1 (node 0, here) ended with exit code 3 (bad data) at 1970-01-01T00:00:00Z: no such file"
        );
        let put_down = RankEnd { asked: Asked::ByFailure, ..end(1, How::Signal(9), 951_782_400.0) };
        assert_eq!(
            said(&put_down),
            "rank 1 (node 0, here) was ended by signal 9 (SIGKILL) by this launcher at 2000-02-29T00:00:00Z"
        );
        assert_eq!(Cause::Node(&lost(2)).describe(meaning), "node 2 (n2) is gone: silent");
    }
}
