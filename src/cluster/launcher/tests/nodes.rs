//! Launchers of two nodes, both on this machine.

use super::*;
use crate::rendezvous::store::Client;
use crate::rendezvous::testing;
use signal_hook::consts::SIGTERM;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

/// A rank that lives until it is told to end, and then leaves with its state saved.
const SAVES: &str = "trap 'exit 75' TERM; : > $DIR/ready$RANK; while :; do sleep 0.05; done";

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn two(ranks: usize, script: &str, change: impl Fn(&mut Job)) -> (Script, [Script; 2]) {
    let mut all = Script::new(ranks, script);
    change(&mut all.job);
    let port = free_port();
    let nodes = [0, 1].map(|node| all.node(node, 2, port));
    (all, nodes)
}

fn client(port: u16) -> Client {
    testing::client(port, "launcher/")
}

fn port(script: &Script) -> u16 {
    script.job.meet.as_ref().unwrap().1
}

#[test]
fn ranks_are_counted_through_over_nodes_in_any_order_of_start() {
    for first in [0, 1] {
        let line =
            "echo $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT > $DIR/$RANK";
        let (all, nodes) = two(2, line, |_| ());
        let started = [nodes[first].start(), nodes[1 - first].start()];
        for running in started {
            assert_eq!(running.ended(), (0, String::new()));
        }
        let port = port(&nodes[0]);
        for (rank, local) in [0, 1, 0, 1].into_iter().enumerate() {
            assert_eq!(all.read(&rank.to_string()), format!("{rank} of 4, {local} of 2 at 127.0.0.1:{port}\n"));
        }
        let said = nodes[0].screen.stderr();
        assert!(said.contains(&port.to_string()) && said.contains("all its interfaces"), "{said}");
    }
}

#[test]
fn a_failure_on_one_node_ends_all_and_is_told_on_all() {
    let fails =
        "if [ $RANK = 3 ]; then until [ -e $DIR/ready0 ] && [ -e $DIR/ready2 ]; do sleep 0.02; done; exit 5; fi";
    let (_all, nodes) = two(2, &format!("{fails}; {SAVES}"), |job| job.max_restarts = 3);
    for running in nodes.each_ref().map(Script::start) {
        let (code, message) = running.ended();
        assert!(code == 5 && message.contains("rank 3 (node 1, ") && message.contains("diverged"), "{message}");
    }
}

#[test]
fn all_nodes_start_again() {
    let (all, nodes) = two(
        1,
        "echo x >> $DIR/runs$RANK; [ $DDPM_DIST_ATTEMPT = 1 ] && exit 0; [ $RANK = 1 ] && kill -KILL $$; exit 6",
        |job| job.max_restarts = 1,
    );
    for running in nodes.each_ref().map(Script::start) {
        let screen = running.screen.clone();
        assert_eq!(running.ended(), (0, String::new()));
        assert!(screen.stderr().contains("rank 1 (node 1") && screen.stderr().contains("restart 1 of 1"));
    }
    assert_eq!((all.read("runs0"), all.read("runs1")), ("x\nx\n".into(), "x\nx\n".into()));
}

#[test]
fn a_signal_at_one_node_lets_all_leave() {
    for told in [0, 1] {
        let (all, nodes) = two(1, SAVES, |job| job.max_restarts = 3);
        let running = nodes.each_ref().map(Script::start);
        all.until(&["ready0", "ready1"]);
        running[told].doorbell.signal(SIGTERM);
        for running in running {
            assert_eq!(running.ended(), (75, String::new()));
        }
    }
}

#[test]
fn nodes_that_do_not_come_are_named_by_the_deadline() {
    let brief = |job: &mut Job| job.patience = Duration::from_millis(300);
    let (all, [lead, _]) = two(1, ": > $DIR/ran", brief);
    let error = lead.run().unwrap_err();
    assert!(matches!(&error, LaunchError::NodesMissing { missing, .. } if *missing == [1]), "{error}");
    let (_all, [_, other]) = two(1, ":", brief);
    let error = other.run().unwrap_err();
    assert!(matches!(error, LaunchError::Store(_)) && error.to_string().contains(&port(&other).to_string()), "{error}");
    assert!(!all.path("ran").exists());
}

#[test]
fn a_signal_ends_the_wait_for_other_nodes() {
    let (_all, nodes) = two(1, ":", |_| ());
    for script in &nodes {
        let running = script.start();
        running.doorbell.signal(SIGTERM);
        assert!(matches!(running.end().unwrap_err(), LaunchError::Stopped(SIGTERM)));
    }
}

/// Nodes 0 and 1 of three, node 1 announced, and the third, without which nothing begins.
fn first_two_of_three(silence: Duration) -> (Script, [Script; 3], Running) {
    let mut all = Script::new(1, "echo $RANK of $WORLD_SIZE > $DIR/$RANK");
    all.job.timing.silence = silence;
    let port = free_port();
    let nodes = [0, 1, 2].map(|node| all.node(node, 3, port));
    let lead = nodes[0].start();
    client(port).wait(&["node/0"], PATIENCE).unwrap();
    (all, nodes, lead)
}

/// The launcher of node 2 comes too, and all is well.
fn all_come(all: &Script, nodes: &[Script; 3], first_two: [Running; 2]) {
    for running in first_two.into_iter().chain([nodes[2].start()]) {
        assert_eq!(running.ended(), (0, String::new()));
    }
    assert_eq!([0, 1, 2].map(|rank| all.read(&rank.to_string())), ["0 of 3\n", "1 of 3\n", "2 of 3\n"]);
}

#[test]
fn a_node_that_is_told_to_leave_before_the_run_begins_can_come_again() {
    let (all, nodes, lead) = first_two_of_three(PATIENCE);
    let told = nodes[1].start();
    client(port(&nodes[1])).wait(&["beat/1"], PATIENCE).unwrap();
    told.doorbell.signal(SIGTERM);
    assert!(matches!(told.end().unwrap_err(), LaunchError::Stopped(SIGTERM)));
    all_come(&all, &nodes, [lead, nodes[1].start()]);
}

#[test]
fn a_node_that_was_killed_before_the_run_begins_is_replaced() {
    let (all, nodes, lead) = first_two_of_three(Duration::from_secs(1));
    silent_node(port(&nodes[0]), 1);
    let second = nodes[1].start();
    until("its successor", || {
        let claim = client(port(&nodes[0])).get("node/1", PATIENCE).unwrap();
        !String::from_utf8(claim).unwrap().contains("silent")
    });
    all_come(&all, &nodes, [lead, second]);
}

#[test]
fn nodes_that_do_not_fit_together_do_not_run() {
    // A second one that says it is node 0 finds the port taken, and a second node 1 is refused.
    let (_all, [lead, other]) = two(1, "until [ -e $DIR/go ]; do sleep 0.02; done", |_| ());
    let running = [lead.start(), other.start()];
    let mut store = client(port(&lead));
    store.wait(&["node/0", "node/1", "order/0"], PATIENCE).unwrap();
    assert!(matches!(lead.run().unwrap_err(), LaunchError::PortTaken { .. }));
    assert!(matches!(other.run().unwrap_err(), LaunchError::Twice { node: 1, .. }));
    let [a, b] = running;
    a.doorbell.signal(SIGTERM);
    assert_eq!((a.ended().0, b.ended().0), (143, 143));

    let (all, [lead, mut other]) = two(1, ": > $DIR/ran", |_| ());
    other.job.nodes = 3;
    let running = [lead.start(), other.start()];
    let [lead, other] = running.map(Running::end);
    let error = lead.unwrap_err();
    assert!(matches!(error, LaunchError::Disagree { node: 1, what: "--nnodes", .. }), "{error}");
    assert_eq!(other.unwrap(), Outcome { code: 8, message: Some(error.to_string()) }, "the other hears why");
    assert!(!all.path("ran").exists());
}

/// Joins as node 1, and gives no further sign.
fn silent_node(port: u16, ranks: usize) {
    let info = serde_json::json!({
        "host": "silent", "ranks": ranks, "nodes": 2, "version": env!("CARGO_PKG_VERSION"), "meets_at": null, "id": "x",
    });
    client(port).set("node/1", info.to_string().as_bytes()).unwrap();
}

#[test]
fn a_node_with_more_ranks_than_there_are_is_refused() {
    for ranks in [4096, usize::MAX] {
        let (all, [lead, _]) = two(1, ": > $DIR/ran", |_| ());
        let running = lead.start();
        silent_node(port(&lead), ranks);
        let error = running.end().unwrap_err();
        assert!(matches!(error, LaunchError::TooMany { most: 4096, .. }), "{error}");
        assert!(!all.path("ran").exists());
    }
}

#[test]
fn a_node_that_vanishes_is_named_and_ends_the_run() {
    let (_all, [lead, _]) = two(1, SAVES, |job| job.timing.silence = Duration::from_secs(1));
    let running = lead.start();
    silent_node(port(&lead), 1);
    let (code, message) = running.ended();
    assert_eq!(code, 6);
    assert!(message.contains("node 1 (silent) is gone") && message.contains("1 s"), "{message}");
}

#[test]
fn a_run_goes_on_without_a_node_that_vanishes_if_it_may() {
    let (_all, [lead, _]) = two(1, &format!("[ $WORLD_SIZE = 2 ] || exit 0; {SAVES}"), |job| {
        job.timing.silence = Duration::from_secs(1);
        (job.max_restarts, job.min_ranks) = (1, Some(1));
    });
    let running = lead.start();
    silent_node(port(&lead), 1);
    assert_eq!(running.ended(), (0, String::new()));
    let said = lead.screen.stderr();
    assert!(said.contains("node 1 (silent) is gone") && said.contains("1 ranks in place of 2"), "{said}");
}

#[test]
fn ranks_do_not_go_on_when_node_0_vanishes() {
    let server = testing::server();
    let port = server.address().port();
    let all = Script::new(1, SAVES);
    let node = all.node(1, 2, port);
    let running = node.start();
    let mut lead = client(port);
    lead.wait(&["node/1"], PATIENCE).unwrap();
    let places = [Place { node: 0, slot: 0 }, Place { node: 1, slot: 0 }].to_vec();
    let attempt = Attempt { number: 0, run_id: "r".into(), places, host: "127.0.0.1".into(), port };
    let order = Order::Start { attempt, because: None };
    lead.set("order/0", &serde_json::to_vec(&order).unwrap()).unwrap();
    all.until(&["ready1"]);
    drop((lead, server));
    let error = running.end().unwrap_err();
    assert!(matches!(&error, LaunchError::LeadLost { host, .. } if host == "127.0.0.1"), "{error}");
}

/// A way to a port that can be blocked, as if the machine behind it were off.
fn blockable_way(to: u16) -> (u16, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, is_blocked) = (listener.local_addr().unwrap().port(), Arc::new(AtomicBool::new(false)));
    let blocked = Arc::clone(&is_blocked);
    std::thread::spawn(move || {
        for here in listener.incoming().flatten() {
            // Before the other side listens, whoever comes this way tries again.
            let Ok(there) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let ways = [(here.try_clone().unwrap(), there.try_clone().unwrap()), (there, here)];
            for (mut from, mut to) in ways {
                let blocked = Arc::clone(&blocked);
                std::thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(1..) = from.read(&mut bytes[..1]) {
                        if !blocked.load(SeqCst) && to.write_all(&bytes[..1]).is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    (port, is_blocked)
}

#[test]
fn ranks_do_not_go_on_when_node_0_no_longer_answers() {
    let (all, [lead, mut other]) = two(1, SAVES, |_| ());
    let (way, is_blocked) = blockable_way(port(&lead));
    other.job.meet = Some(("127.0.0.1".into(), way));
    other.job.timing.silence = Duration::from_secs(1);
    let [lead, other] = [lead.start(), other.start()];
    all.until(&["ready0", "ready1"]);
    is_blocked.store(true, SeqCst);
    let error = other.end().unwrap_err();
    assert!(matches!(&error, LaunchError::LeadLost { .. }) && error.to_string().contains("not answered"), "{error}");
    lead.doorbell.signal(SIGTERM);
    lead.doorbell.signal(signal_hook::consts::SIGINT);
    lead.end().unwrap();
}

#[test]
fn a_launcher_that_hears_nonsense_says_so() {
    let server = testing::server();
    let port = server.address().port();
    client(port).set("order/0", b"{}").unwrap();
    let error = Script::new(1, ":").node(1, 2, port).run().unwrap_err();
    assert!(matches!(&error, LaunchError::Garbled { key } if key == "launcher/order/0"), "{error}");
}
