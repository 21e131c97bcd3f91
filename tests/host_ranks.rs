//! Ranks as real processes that are killed or stopped: the others end in time and name the one that was lost.
//!
//! A rank is this test program itself, told by its environment to run [`a_rank`] instead.

use ddpm_dist::cluster::watchdog::Watchdog;
use ddpm_dist::collective::host::{Host, Meeting};
use ddpm_dist::collective::{Collective, Exchange, Record};
use ddpm_dist::device::{Device, cpu::Cpu};
use ddpm_dist::rendezvous::store::{Client, Server};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For ranks to come and, in most tests, for anything: more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
const FLOATS: usize = 200_001;

/// The environment of a rank: number, size, port of the store, whether memory is shared, whether rank 0 serves the store, deadline in ms.
const PLACE: &str = "HOST_RANKS_PLACE";

struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.0 {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

#[derive(Clone, Copy)]
struct World {
    size: usize,
    shared: bool,
    rank_zero_serves: bool,
    deadline: Duration,
}

impl World {
    /// Starts the ranks; returns when all have been through some steps. The server lives as long as what is returned.
    fn start(self) -> (Ranks, Option<Server>) {
        let (port, server) = if self.rank_zero_serves {
            let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            (free.local_addr().unwrap().port(), None)
        } else {
            let server = Server::listen(([127, 0, 0, 1], 0).into()).unwrap();
            (server.address().port(), Some(server))
        };
        let World { size, shared, rank_zero_serves, deadline } = self;
        let start = |rank| {
            let place = format!("{rank} {size} {port} {shared} {rank_zero_serves} {}", deadline.as_millis());
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--ignored", "--exact", "a_rank", "--nocapture", "--test-threads=1"]).env(PLACE, place);
            command.stdout(Stdio::piped()).spawn().unwrap()
        };
        let mut ranks = Ranks((0..size).map(start).collect());
        for rank in &mut ranks.0 {
            // Byte by byte: what follows is read later.
            let mut said = String::new();
            while !said.ends_with("at work\n") {
                let mut byte = [0];
                rank.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
                said.push(byte[0].into());
            }
        }
        (ranks, server)
    }
}

/// What a rank said at its end, and when that was.
fn last_words(rank: &mut Child, since: Instant) -> (String, Duration) {
    let lines = BufReader::new(rank.stdout.take().unwrap()).lines();
    let end = lines.map_while(Result::ok).find(|line| line.contains("ended: ")).unwrap();
    (end, since.elapsed())
}

fn signal(rank: &Child, signal: Signal) {
    kill_process(Pid::from_child(rank), signal).unwrap();
}

/// The rank that the tests below start.
#[test]
#[ignore = "is started by the tests below"]
fn a_rank() {
    let Ok(place) = std::env::var(PLACE) else { return };
    let place: Vec<&str> = place.split(' ').collect();
    let number = |i: usize| place[i].parse::<usize>().unwrap();
    let (rank, size, port, deadline) =
        (number(0), number(1), number(2) as u16, Duration::from_millis(number(5) as u64));
    let serves = rank == 0 && place[4] == "true";
    let _server = serves.then(|| Server::listen(([127, 0, 0, 1], port).into()).unwrap());
    let connect = || connect(port);
    let one_machine = place[3] == "true";
    let meeting = Meeting { rank, size, one_machine, store: connect(), patience: PATIENCE };
    let mut host = Host::join(meeting, deadline).unwrap();
    assert_eq!(host.notice(), None);
    let activity = host.activity();
    let watchdog = Watchdog::start(connect(), rank, size, host.activity(), Duration::from_secs(1)).unwrap();
    let mut device = Device::Cpu(Cpu::new(1));
    let buffer = device.allocate(4 * FLOATS).unwrap();
    let end = Instant::now() + PATIENCE;
    let mut step = 0;
    let error = loop {
        step += 1;
        activity.note(step, "sums");
        let result = host.start(Exchange::AllReduce, &mut device, buffer, 0..FLOATS).and_then(|()| {
            host.start(Exchange::AllReduce, &mut device, buffer, 0..1000)?;
            host.wait(Exchange::AllReduce, &mut device, buffer, 0..FLOATS)?;
            host.wait(Exchange::AllReduce, &mut device, buffer, 0..1000)
        });
        match result {
            Err(error) => break error,
            Ok(()) if step == 5 => tell("at work"),
            Ok(()) => assert!(Instant::now() < end, "the test has forgotten this rank"),
        }
    };
    tell(&format!("ended: {error}"));
    tell(&format!("explained: {}", watchdog.explain(&error, Duration::from_secs(10))));
    std::process::exit(0);
}

fn connect(port: u16) -> Client {
    Client::connect("127.0.0.1", port, "/test/", PATIENCE).unwrap()
}

/// To the test, which may have heard enough.
fn tell(what: &str) {
    let _ = writeln!(std::io::stdout(), "{what}").and_then(|()| std::io::stdout().flush());
}

#[test]
fn a_killed_rank_is_named_within_five_seconds() {
    for (victim, shared, rank_zero_serves) in [(1, true, false), (2, false, false), (0, true, true)] {
        let (mut ranks, _server) = World { size: 3, shared, rank_zero_serves, deadline: PATIENCE }.start();
        let start = Instant::now();
        signal(&ranks.0[victim], Signal::KILL);
        for (rank, child) in ranks.0.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
            let (said, after) = last_words(child, start);
            assert!(said.contains(&format!("rank {victim} was lost")), "rank {rank}: {said}");
            assert!(after < Duration::from_secs(5), "{after:?}");
        }
    }
}

#[test]
fn a_stopped_rank_is_named_at_the_deadline() {
    let deadline = Duration::from_secs(2);
    for (victim, shared, rank_zero_serves) in [(1, true, false), (0, true, true), (1, false, true)] {
        let (mut ranks, _server) = World { size: 3, shared, rank_zero_serves, deadline }.start();
        let start = Instant::now();
        signal(&ranks.0[victim], Signal::STOP);
        for (rank, child) in ranks.0.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
            let (said, after) = last_words(child, start);
            let is_named = said.contains(&format!("ranks [{victim}] did not answer"))
                || said.contains(&format!("rank {victim} was lost"));
            assert!(is_named, "rank {rank}: {said}");
            assert!(after >= deadline && after < deadline + Duration::from_secs(2), "{after:?}");
        }
    }
}

#[test]
fn what_the_lost_rank_was_doing_is_told() {
    let (mut ranks, server) =
        World { size: 2, shared: true, rank_zero_serves: false, deadline: Duration::from_secs(2) }.start();
    let mut store = connect(server.as_ref().unwrap().address().port());
    let mut step = || serde_json::from_slice::<Record>(&store.get("watch/1", PATIENCE).unwrap()).unwrap().step;
    let end = Instant::now() + PATIENCE;
    while step() == 0 {
        assert!(Instant::now() < end, "rank 1 does not say what it does");
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(&ranks.0[1], Signal::STOP);
    let lines = BufReader::new(ranks.0[0].stdout.take().unwrap()).lines();
    let said = lines.map_while(Result::ok).find(|line| line.contains("explained: ")).unwrap();
    assert!(said.contains("; rank 1 has shown no sign of life for"), "{said}");
    assert!(said.contains(": sums, "), "{said}");
}

/// Each maps a window of its own and a view of the other's, files without a name: a kill leaves nothing behind.
#[test]
fn what_ranks_share_has_no_name_that_could_outlive_them() {
    let (ranks, _server) = World { size: 2, shared: true, rank_zero_serves: false, deadline: PATIENCE }.start();
    let is_shared = |line: &str| line.split(' ').nth(1).is_some_and(|access| access.ends_with('s'));
    for rank in &ranks.0 {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", rank.id())).unwrap();
        let shared: Vec<&str> = maps.lines().filter(|line| is_shared(line)).collect();
        assert_eq!(shared.len(), 2, "{maps}");
        assert!(
            shared.iter().all(|line| line.contains("/memfd:ddpm-dist") && line.ends_with("(deleted)")),
            "{shared:?}"
        );
    }
}
