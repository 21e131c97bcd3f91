//! What ended attempts mean, as a table.

use super::super::ends::Asked;
use super::super::tests::{end, meaning};
use super::*;

const ANY: fn(usize) -> bool = |_| true;
const POWERS_OF_TWO: fn(usize) -> bool = usize::is_power_of_two;

fn limits(max_restarts: u32, min_ranks: Option<usize>, allowed: &dyn Fn(usize) -> bool) -> Limits<'_> {
    Limits { max_restarts, min_ranks, allowed, meaning, peer_lost: 6 }
}

/// Ranks 0 to `world` on nodes of `per_node` places, nothing behind them.
fn fresh(world: usize, per_node: usize) -> History {
    let places = (0..world).map(|rank| Place { node: rank / per_node, slot: rank % per_node }).collect();
    History { places, world, restarts: 0, failed_at: None }
}

fn asked(asked: Asked, end: RankEnd) -> RankEnd {
    RankEnd { asked, ..end }
}

#[test]
fn what_ends_a_run_and_with_which_code() {
    let exits = |codes: &[i32]| -> Vec<RankEnd> {
        codes.iter().enumerate().map(|(rank, code)| end(rank, How::Exit(*code), rank as f64)).collect()
    };
    let leaves = |end| asked(Asked::ToLeave, end);
    let killed = leaves(end(1, How::Signal(9), 9.0));
    for (name, ends, stop, restarts, code, words) in [
        ("done", exits(&[0, 0]), None, 3, 0, &[][..]),
        ("no restarts", exits(&[0, 1]), None, 0, 1, &["rank 1", "exit code 1", "--max-restarts N"]),
        ("usage", exits(&[2, 0]), None, 3, 2, &["usage", "the same would come again"]),
        ("usage, no restarts", exits(&[2, 0]), None, 0, 2, &["usage"]),
        ("bad data and its peers", exits(&[6, 3, 6]), None, 3, 3, &["rank 1", "bad data"]),
        ("diverged", exits(&[5, 5]), None, 3, 5, &["diverged"]),
        ("not started", vec![end(0, How::NotStarted("no such file".into()), 0.0)], None, 3, 1, &["no such file"]),
        ("killed", vec![end(2, How::Signal(9), 0.0)], None, 0, 137, &["SIGKILL", "memory"]),
        ("left by itself", exits(&[75, 75]), None, 3, 75, &[]),
        ("some were done", exits(&[75, 0]), None, 3, 75, &[]),
        ("peers of those who left", exits(&[75, 6]), Some(15), 3, 75, &[]),
        ("one could not save", exits(&[75, 4]), Some(15), 3, 4, &["rank 1", "exit code 4"]),
        ("a stop, all done", exits(&[0, 0]), Some(15), 3, 0, &[]),
        ("a stop, nothing to save", vec![leaves(end(0, How::Exit(143), 0.0))], Some(15), 3, 143, &[]),
        ("Ctrl-C, no handler", vec![leaves(end(0, How::Signal(2), 0.0))], Some(2), 3, 130, &[]),
        (
            "killed after grace",
            vec![end(0, How::Exit(0), 0.0), killed.clone()],
            Some(15),
            3,
            143,
            &["in time", "rank 1"],
        ),
        ("saved, one killed after grace", vec![end(0, How::Exit(75), 0.0), killed], Some(15), 3, 75, &[]),
        ("a stop after peers were lost", exits(&[6, 6]), Some(15), 3, 6, &["missed another rank"]),
    ] {
        let history = &mut fresh(2, 2);
        match decide(&ends, &[], stop, history, &limits(restarts, None, &ANY)) {
            Decision::Stop { code: found, message } => {
                let message = message.unwrap_or_default();
                assert_eq!(found, code, "{name}: {message}");
                assert!(words.iter().all(|word| message.contains(word)), "{name}: {message}");
                assert_eq!(message.is_empty(), words.is_empty(), "{name}: {message}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn what_starts_ranks_again_and_how_often() {
    for ends in [
        vec![end(1, How::Signal(9), 1.0), end(0, How::Exit(6), 2.0)],
        vec![end(1, How::Exit(7), 1.0)],
        vec![end(1, How::Exit(1), 1.0), end(0, How::Exit(0), 0.0)],
        vec![end(0, How::Exit(6), 1.0), end(1, How::Exit(6), 1.0)],
        // A rank that was left over saved and left: that is nobody's wish.
        vec![end(1, How::Signal(11), 1.0), asked(Asked::ByFailure, end(0, How::Exit(75), 2.0))],
    ] {
        let history = &mut fresh(2, 2);
        for restart in 1..=2 {
            match decide(&ends, &[], None, history, &limits(2, None, &ANY)) {
                Decision::Restart { places, because } => {
                    assert_eq!(places, fresh(2, 2).places);
                    assert!(because.contains(&format!("restart {restart} of 2")), "{because}");
                }
                other => panic!("{other:?}"),
            }
        }
        let last = decide(&ends, &[], None, history, &limits(2, None, &ANY));
        assert!(matches!(last, Decision::Stop { message: Some(text), .. } if text.contains("used up")));
    }
}

#[test]
fn a_place_that_fails_twice_in_a_row_is_given_up() {
    let fails = |slot: usize| [end(slot, How::Signal(9), 1.0)];
    let restart = |history: &mut History, slot, least, allowed: &dyn Fn(usize) -> bool| match decide(
        &fails(slot),
        &[],
        None,
        history,
        &limits(9, least, allowed),
    ) {
        Decision::Restart { places, because } => (places.iter().map(|place| place.slot).collect::<Vec<_>>(), because),
        other => panic!("{other:?}"),
    };
    // Four, of which place 1 is bad: two are the next that powers of two allow.
    let history = &mut fresh(4, 4);
    assert_eq!(restart(history, 1, Some(2), &POWERS_OF_TWO).0, [0, 1, 2, 3]);
    let (places, because) = restart(history, 1, Some(2), &POWERS_OF_TWO);
    assert_eq!(places, [0, 2]);
    assert!(because.contains("2 ranks in place of 4, without place 1 of node 0"), "{because}");
    // Then place 2. There is another for it, and the number stays.
    assert_eq!(restart(history, 2, Some(2), &POWERS_OF_TWO).0, [0, 2]);
    let (places, because) = restart(history, 2, Some(2), &POWERS_OF_TWO);
    assert_eq!(places, [0, 3]);
    assert!(because.contains("with 2 ranks, without place 2 of node 0"), "{because}");
    // One is fewer than the least: nothing is given up.
    restart(history, 0, Some(2), &POWERS_OF_TWO);
    assert_eq!(restart(history, 0, Some(2), &POWERS_OF_TWO).0, [0, 3]);

    let history = &mut fresh(3, 3);
    for (slot, expected) in [(0, vec![0, 1, 2]), (1, vec![0, 1, 2]), (0, vec![0, 1, 2]), (0, vec![1, 2])] {
        assert_eq!(restart(history, slot, Some(1), &ANY).0, expected, "in a row, not in all");
    }
    let history = &mut fresh(3, 3);
    for _ in 0..3 {
        assert_eq!(restart(history, 2, None, &ANY).0, [0, 1, 2], "only where fewer are welcome");
    }
}

#[test]
fn a_node_that_is_gone() {
    let gone = [LostNode { node: 1, host: "n1".into(), why: "silent".into() }];
    let ends = [end(0, How::Exit(6), 1.0), end(1, How::Exit(6), 1.0)];
    match decide(&ends, &gone, None, &mut fresh(4, 2), &limits(3, Some(1), &ANY)) {
        Decision::Restart { places, because } => {
            assert_eq!(places, fresh(2, 2).places);
            assert!(
                because.contains("node 1 (n1) is gone: silent") && because.contains("2 ranks in place of 4"),
                "{because}"
            );
        }
        other => panic!("{other:?}"),
    }
    for (restarts, least, words) in
        [(3, None, "--min-ranks"), (3, Some(3), "--min-ranks"), (0, Some(1), "--max-restarts")]
    {
        match decide(&ends, &gone, None, &mut fresh(4, 2), &limits(restarts, least, &ANY)) {
            Decision::Stop { code: 6, message: Some(message) } => assert!(message.contains(words), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_largest_number_that_is_allowed() {
    for (places, least, allowed, expected) in
        [(8, 8, ANY, Some(8)), (7, 1, POWERS_OF_TWO, Some(4)), (7, 5, POWERS_OF_TWO, None), (0, 0, ANY, None)]
    {
        assert_eq!(largest(places, least, &allowed), expected, "{places} {least}");
    }
}
