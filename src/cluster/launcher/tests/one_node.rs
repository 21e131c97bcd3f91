//! Launchers of one node.

use super::*;
use crate::rendezvous::testing;
use crate::rendezvous::{Detected, Environment, StoreHost, World, detect};
use signal_hook::consts::{SIGINT, SIGTERM};

/// A rank that lives until it is told to end.
const LIVES: &str = "while :; do sleep 0.05; done";

/// What `env` has written says of a process.
fn world(text: &str) -> World {
    let environment: Environment = text.lines().filter_map(|line| line.split_once('=')).collect();
    match detect(&environment) {
        Ok(Detected::Rank(world)) => world,
        other => panic!("{other:?}: {text}"),
    }
}

#[test]
fn ranks_know_who_they_are_and_find_the_store() {
    let script = Script::new(3, "env > $DIR/env$RANK; : > $DIR/ready$RANK; until [ -e $DIR/go ]; do sleep 0.02; done");
    let running = script.start();
    script.until(&["ready0", "ready1", "ready2"]);
    for rank in 0..3 {
        let world = world(&script.read(&format!("env{rank}")));
        assert_eq!((world.rank, world.size, world.local_rank, world.local_size), (rank, 3, rank, 3));
        assert_eq!((world.launcher, world.attempt), (crate::rendezvous::Launcher::Own, 0));
        assert_eq!(world.store.served_by, StoreHost::Launcher);
        let mut client = testing::client(world.store.port, "");
        assert_eq!(world.store.host, "127.0.0.1");
        assert_eq!(client.add("ranks", 1).unwrap(), rank as i64 + 1);
    }
    std::fs::write(script.path("go"), "").unwrap();
    assert_eq!(running.ended(), (0, String::new()));
}

#[test]
fn only_rank_0_speaks_for_itself() {
    let mut script = Script::new(2, "echo result$RANK; echo alarm$RANK >&2");
    script.job.log_dir = Some(script.path("logs"));
    assert_eq!(script.ended(), (0, String::new()));
    assert_eq!(script.screen.stdout(), b"result0\n");
    let mut lines: Vec<String> = script.screen.stderr().lines().map(String::from).collect();
    lines.sort();
    assert_eq!(lines, ["[rank 1] alarm1", "[rank 1] result1", "alarm0"]);
    for rank in 0..2 {
        let log = |name: &str| script.read(&format!("logs/attempt-0/rank-0000{rank}/{name}.log"));
        assert_eq!((log("stdout"), log("stderr")), (format!("result{rank}\n"), format!("alarm{rank}\n")));
    }
}

#[test]
fn the_first_cause_and_its_own_words() {
    let says = r#"printf '{"message": {"message": "no pictures here", "extraInfo": {}}}' > $TORCHELASTIC_ERROR_FILE"#;
    let script = Script::new(3, &format!("[ $RANK = 1 ] || exit 6; {says}; exit 3"));
    let (code, message) = script.ended();
    assert_eq!(code, 3, "{message}");
    for words in ["rank 1 (node 0, ", "exit code 3 (bad data)", "no pictures here"] {
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_rank_that_is_killed() {
    let script = Script::new(2, "[ $RANK = 1 ] && kill -KILL $$; exit 6");
    let (code, message) = script.ended();
    assert_eq!(code, 137);
    assert!(message.contains("rank 1") && message.contains("SIGKILL"), "{message}");
}

#[test]
fn an_error_of_an_earlier_run_is_not_taken_for_this_ones() {
    let mut script = Script::new(1, "exit 1");
    script.job.log_dir = Some(script.path("logs"));
    let folder = script.path("logs/attempt-0/rank-00000");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("error.json"), r#"{"message": "long ago"}"#).unwrap();
    let (code, message) = script.ended();
    assert!(code == 1 && !message.contains("long ago"), "{message}");
}

#[test]
fn those_whom_a_failure_leaves_over_are_told_to_end() {
    // Rank 1 waits until rank 0 listens.
    let fails = "if [ $RANK = 1 ]; then until [ -e $DIR/ready ]; do sleep 0.02; done; exit 1; fi";
    let script = Script::new(2, &format!("{fails}; trap ': > $DIR/told; exit 75' TERM; : > $DIR/ready; {LIVES}"));
    let (code, message) = script.ended();
    assert!(code == 1 && message.contains("rank 1"), "{code}: {message}");
    assert!(script.path("told").exists());
}

#[test]
fn those_who_do_not_listen_are_killed() {
    let mut script = Script::new(2, &format!("[ $RANK = 1 ] && exit 1; trap '' TERM; echo $$ > $DIR/pid; {LIVES}"));
    script.job.timing.grace = Duration::from_millis(200);
    // Rank 1 waits for rank 0, so that the trap is there.
    let script_text = script.job.command.arguments[1].to_str().unwrap();
    script.job.command.arguments[1] =
        script_text.replace("= 1 ] &&", "= 1 ] && until [ -s $DIR/pid ]; do sleep 0.02; done && ").into();
    let (code, message) = script.ended();
    assert!(code == 1 && message.contains("rank 1"), "{code}: {message}");
    assert!(!is_alive(&script.read("pid")));
}

#[test]
fn a_rank_that_is_stopped_hears_it_too() {
    // The other one notices, as ranks do, that it is missing.
    let script = Script::new(
        2,
        "if [ $RANK = 1 ]; then echo $$ > $DIR/pid; kill -STOP $$; exit 0; fi; until [ -s $DIR/pid ]; do sleep 0.02; done; exit 6",
    );
    let (code, message) = script.ended();
    assert!(code == 6 && message.contains("rank 0"), "{code}: {message}");
    assert!(!is_alive(&script.read("pid")));
}

#[test]
fn ranks_start_again_where_that_helps() {
    let mut script =
        Script::new(2, "echo $DDPM_DIST_ATTEMPT; [ $RANK = 0 ] || [ $DDPM_DIST_ATTEMPT = 2 ] || kill -SEGV $$");
    script.job.max_restarts = 3;
    assert_eq!(script.ended(), (0, String::new()));
    assert_eq!(script.screen.stdout(), b"0\n1\n2\n");
    let stderr = script.screen.stderr();
    assert!(stderr.contains("SIGSEGV") && stderr.contains("restart 2 of 3"), "{stderr}");

    let mut script = Script::new(1, "echo once; exit 5");
    script.job.max_restarts = 3;
    let (code, message) = script.ended();
    assert!(code == 5 && message.contains("the same would come again"), "{message}");
    assert_eq!(script.screen.stdout(), b"once\n");
}

#[test]
fn fewer_ranks_go_on_without_a_place_that_keeps_failing() {
    let mut script = Script::new(
        4,
        "[ $DDPM_DIST_SLOT != 1 ] || exit 1; [ $WORLD_SIZE = 3 ] || exit 6; echo $LOCAL_RANK $DDPM_DIST_SLOT > $DIR/$RANK",
    );
    (script.job.max_restarts, script.job.min_ranks) = (5, Some(2));
    assert_eq!(script.ended(), (0, String::new()));
    let stderr = script.screen.stderr();
    assert!(stderr.contains("3 ranks in place of 4, without place 1 of node 0"), "{stderr}");
    let places: Vec<String> = (0..3).map(|rank| script.read(&rank.to_string())).collect();
    assert_eq!(places, ["0 0\n", "1 2\n", "2 3\n"]);
}

#[test]
fn a_signal_lets_ranks_save_and_leave() {
    for (signal, name) in [(SIGTERM, "TERM"), (SIGINT, "INT"), (signal_hook::consts::SIGUSR1, "USR1")] {
        let script =
            Script::new(2, &format!("trap ': > $DIR/told$RANK; exit 75' {name}; : > $DIR/ready$RANK; {LIVES}"));
        let running = script.start();
        script.until(&["ready0", "ready1"]);
        running.doorbell.signal(signal);
        assert_eq!(running.ended(), (75, String::new()));
        script.until(&["told0", "told1"]);
    }
}

#[test]
fn a_rank_that_leaves_takes_all_along_without_a_failure() {
    let mut script = Script::new(2, "[ $RANK = 0 ] || exit 75; trap 'exit 75' TERM; while :; do sleep 0.05; done");
    script.job.max_restarts = 3;
    script.job.timing.grace = Duration::from_millis(500);
    assert_eq!(script.ended(), (75, String::new()));
}

#[test]
fn ranks_without_a_state_end_as_the_signal_says() {
    let script = Script::new(2, &format!(": > $DIR/ready$RANK; {LIVES}"));
    let running = script.start();
    script.until(&["ready0", "ready1"]);
    running.doorbell.signal(SIGTERM);
    assert_eq!(running.ended(), (143, String::new()));
}

/// It has saved nothing, whoever it was that wanted the run to leave; its peer only misses it.
#[test]
fn a_rank_that_is_killed_while_it_leaves_is_the_cause() {
    let killed = "[ $RANK = 1 ] || { trap 'kill -9 $$' TERM; : > $DIR/ready0; while :; do sleep 0.05; done; }";
    let misses = "trap 'exit 6' TERM; : > $DIR/ready1; while :; do sleep 0.05; done";
    let script = Script::new(2, &format!("{killed}; {misses}"));
    let running = script.start();
    script.until(&["ready0", "ready1"]);
    running.doorbell.signal(SIGTERM);
    let (code, message) = running.ended();
    assert_eq!(code, 137, "{message}");
    assert!(message.contains("rank 0") && message.contains("SIGKILL"), "{message}");
}

/// As libraries do that lose their peers.
#[test]
fn a_rank_that_falls_because_another_failed_is_not_the_cause() {
    let falls = "[ $RANK = 1 ] || { trap 'kill -SEGV $$' TERM; : > $DIR/ready0; while :; do sleep 0.05; done; }";
    let script = Script::new(2, &format!("{falls}; until [ -e $DIR/ready0 ]; do sleep 0.05; done; exit 6"));
    let (code, message) = script.ended();
    assert_eq!(code, 6, "{message}");
    assert!(message.contains("rank 1"), "{message}");
}

#[test]
fn a_second_ctrl_c_ends_all_at_once() {
    let script = Script::new(2, &format!("trap '' INT TERM; echo $$ > $DIR/pid$RANK; : > $DIR/ready$RANK; {LIVES}"));
    let running = script.start();
    script.until(&["ready0", "ready1"]);
    running.doorbell.signal(SIGINT);
    running.doorbell.signal(SIGINT);
    let (code, _) = running.ended();
    assert_eq!(code, 130);
    assert!((0..2).all(|rank| !is_alive(&script.read(&format!("pid{rank}")))));
}

#[test]
fn what_a_rank_leaves_behind_ends_with_it() {
    let script = Script::new(2, "sleep 1000 & echo $! > $DIR/pid$RANK");
    assert_eq!(script.ended(), (0, String::new()));
    for rank in 0..2 {
        let pid = script.read(&format!("pid{rank}"));
        until("the end of what was left", || !is_alive(&pid));
    }
}

#[test]
fn what_cannot_begin_is_said_before_anything_runs() {
    let mut script = Script::new(2, ":");
    script.job.command.program = "/no/such/program".into();
    script.job.max_restarts = 3;
    let (code, message) = script.ended();
    assert!(code == 1 && message.contains("could not be started"), "{message}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut script = Script::new(1, ": > $DIR/ran");
    script.job.meet = Some(("127.0.0.1".into(), port));
    let error = script.run().unwrap_err();
    assert!(matches!(error, LaunchError::PortTaken { port: found } if found == port), "{error}");

    let mut script = Script::new(1, ": > $DIR/ran");
    script.job.log_dir = Some(PathBuf::from("/proc/no/such/folder"));
    assert!(matches!(script.run().unwrap_err(), LaunchError::Folder { .. }));

    let mut script = Script::new(5, ": > $DIR/ran");
    let error = script.run().unwrap_err();
    assert!(matches!(error, LaunchError::NotAllowed { ranks: 5, fits: Some(4) }), "{error}");
    assert!(error.to_string().contains("--min-ranks 4"), "{error}");
    script.job.min_ranks = Some(6);
    assert!(matches!(script.run().unwrap_err(), LaunchError::TooFew { least: 6, ranks: 5 }));
    assert!(!script.path("ran").exists());
    script.job.min_ranks = Some(2);
    assert_eq!(script.ended().0, 0);
    assert!(script.screen.stderr().contains("4 ranks in place of 5"), "{}", script.screen.stderr());
}
