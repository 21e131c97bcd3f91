//! Peers and strangers that say anything: what comes of it is an error that names them, in time, and never a panic.

use super::super::exchange::MAX_BYTES;
use super::super::mesh::GREETING;
use super::super::segment::Window;
use super::super::stream::Stream;
use super::*;
use proptest::prelude::*;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::{Arc, Barrier, Mutex};

const DEADLINE: Duration = Duration::from_millis(250);
/// What a busy machine may take on top.
const SLACK: Duration = Duration::from_secs(3);

/// Where a rank listens, and how another greets it.
fn greeting_of(server: &Server, from: u32, to: usize) -> (String, Vec<u8>) {
    let mut store = connect(server);
    let address = store.get(&format!("collective/address/{to}"), PATIENCE).unwrap();
    let token = store.get("collective/token", PATIENCE).unwrap();
    (String::from_utf8(address).unwrap(), [b"ddpm-co1", &token[..], &from.to_le_bytes()].concat())
}

/// Where rank 0 listens, and how rank 1 greets it.
fn greeting(server: &Server) -> (String, Vec<u8>) {
    greeting_of(server, 1, 0)
}

/// Rank 0 of two at work beside a rank 1 that is a connection and what `peer` does with it.
fn beside<T: Send>(one_machine: bool, peer: impl FnOnce(Stream) + Send, work: impl FnOnce(Host) -> T + Send) -> T {
    let server = server();
    std::thread::scope(|scope| {
        let (address, hello);
        let first = scope.spawn(|| work(join_by(&server, one_machine, 0, 2, DEADLINE).unwrap()));
        (address, hello) = greeting(&server);
        let stream = Stream::connect(&address, PATIENCE).unwrap();
        (&stream).write_all(&hello).unwrap();
        peer(stream);
        first.join().unwrap()
    })
}

/// Writes all at once or a byte at a time, as far as the other side takes it.
fn say(stream: &Stream, bytes: &[u8], drips: bool) {
    for piece in bytes.chunks(if drips { 1 } else { bytes.len().max(1) }) {
        std::thread::sleep(Duration::from_millis(if drips { 15 } else { 0 }));
        let mut stream = stream;
        let _ = stream.write_all(piece);
    }
}

fn header(sequence: u64, len: u64, kind: u8) -> Vec<u8> {
    [&sequence.to_le_bytes()[..], &len.to_le_bytes(), &[kind]].concat()
}

/// Asks for a sum of 100 floats.
fn sum(host: &mut Host) -> Result<(), CollectiveError> {
    let mut device = Device::Cpu(Cpu::new(1));
    let buffer = device.allocate(400).unwrap();
    host.start(Exchange::AllReduce, &mut device, buffer, 0..100)?;
    host.wait(Exchange::AllReduce, &mut device, buffer, 0..100)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any bytes, and right messages with one byte changed or cut short, at once or drop by drop, from a peer that stays or goes.
    #[test]
    fn a_peer_that_says_anything_ends_the_operation_in_time(
        noise in proptest::collection::vec(any::<u8>(), 0..60),
        at in any::<prop::sample::Index>(), to: u8, cut in any::<prop::sample::Index>(),
        is_noise: bool, gathers: bool, drips: bool, stays: bool,
    ) {
        let right = match gathers {
            true => [header(1, 8, 3), 5u64.to_le_bytes().to_vec(), header(1, 5, 2), b"hello".to_vec()].concat(),
            false => [header(1, 48 * 4, 1), vec![0; 48 * 4], header(1, 52 * 4, 2), vec![0; 52 * 4]].concat(),
        };
        let bytes = if is_noise {
            noise
        } else {
            let mut bytes = right;
            let at = at.index(bytes.len());
            bytes[at] = to;
            bytes.truncate(cut.index(bytes.len()) + 1);
            bytes
        };
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let peer = move |stream: Stream| {
            say(&stream, &bytes[..bytes.len().min(if drips { 30 } else { usize::MAX })], drips);
            if stays {
                let _ = wait.recv();
            }
        };
        let (result, took) = beside(false, peer, move |mut host| {
            let start = Instant::now();
            let result = if gathers { host.all_gather(b"mine".to_vec()).map(drop) } else { sum(&mut host) };
            let took = start.elapsed();
            drop(over);
            (result, took)
        });
        // A gather is two rounds, each with the deadline.
        prop_assert!(took < 2 * DEADLINE + SLACK, "{took:?}");
        if let Err(error) = result {
            let is_named = match &error {
                CollectiveError::PeerLost { rank, .. } | CollectiveError::OutOfStep { rank, .. } => *rank == 1,
                CollectiveError::TimedOut { ranks, .. } => *ranks == [1],
                _ => false,
            };
            prop_assert!(is_named, "{error}");
        }
    }

    /// Strangers that say anything, nothing, or it slowly do not keep the ranks apart; they stay connected all the while.
    #[test]
    fn strangers_hold_up_nobody(
        one_machine: bool,
        said in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..30), 8..12),
    ) {
        let server = server();
        let took = std::thread::scope(|scope| {
            let first = scope.spawn(|| join_by(&server, one_machine, 0, 2, PATIENCE).unwrap());
            let (address, _) = greeting(&server);
            let strangers: Vec<Stream> = said
                .iter()
                .map(|bytes| {
                    let stream = Stream::connect(&address, PATIENCE).unwrap();
                    say(&stream, bytes, false);
                    stream
                })
                .collect();
            let start = Instant::now();
            let second = scope.spawn(|| join_by(&server, one_machine, 1, 2, PATIENCE).unwrap());
            let hosts = [first, second].map(|host| host.join().unwrap());
            let took = start.elapsed();
            drop(strangers);
            let ranks = hosts.map(|mut host| scope.spawn(move || host.barrier().unwrap()));
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
            took
        });
        // One at a time they would take a greeting's time each.
        prop_assert!(took < 2 * GREETING + 2 * SLACK, "{took:?} with {} strangers", said.len());
    }
}

/// Rank 2 falls silent when rank 1 has its word and rank 0 has not: rank 0 waits for rank 2, rank 1 for both. No store is left to agree in,
/// as when the silent rank serves it. The one that has begun to wait later need not wait out its time.
#[test]
fn who_waits_for_another_is_not_blamed() {
    for deadlines in [[DEADLINE; 2], [DEADLINE, PATIENCE]] {
        let server = Mutex::new(Some(Arc::new(server())));
        let (all_have_met, store_is_gone) = (Barrier::new(3), Barrier::new(3));
        let errors = std::thread::scope(|scope| {
            let store = || Arc::clone(server.lock().unwrap().as_ref().unwrap());
            let (all_have_met, store_is_gone) = (&all_have_met, &store_is_gone);
            let ranks = [0, 1].map(|rank| {
                let store = store();
                scope.spawn(move || {
                    let mut host = join_by(&store, false, rank, 3, deadlines[rank]).unwrap();
                    drop(store);
                    all_have_met.wait();
                    store_is_gone.wait();
                    let start = Instant::now();
                    (host.barrier().unwrap_err(), start.elapsed())
                })
            });
            let streams = [0, 1].map(|rank| {
                let (address, hello) = greeting_of(&store(), 2, rank);
                let stream = Stream::connect(&address, PATIENCE).unwrap();
                say(&stream, &hello, false);
                stream
            });
            all_have_met.wait();
            drop(server.lock().unwrap().take());
            say(&streams[1], &[header(1, 8, 3), 0u64.to_le_bytes().to_vec()].concat(), false);
            store_is_gone.wait();
            ranks.map(|rank| rank.join().unwrap())
        });
        for (error, after) in errors {
            assert!(matches!(&error, CollectiveError::TimedOut { ranks, .. } if *ranks == [2]), "{error}");
            assert!(after < DEADLINE + SLACK, "{after:?}");
        }
    }
}

#[test]
fn who_is_out_of_step_is_told_how() {
    let cases: [(&str, bool, Vec<u8>); 6] = [
        ("number 2", true, header(2, 8, 3)),
        ("length", false, header(1, 8, 3)),
        ("of 9 bytes", true, header(1, 9, 3)),
        ("something unknown", true, header(1, 8, 77)),
        ("18446744073709551615 bytes", false, header(1, u64::MAX, 1)),
        ("16777217 bytes", true, [header(1, 8, 3), (MAX_BYTES + 1).to_le_bytes().to_vec()].concat()),
    ];
    for (word, gathers, bytes) in cases {
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let peer = move |stream: Stream| {
            say(&stream, &bytes, false);
            let _ = wait.recv();
        };
        let error = beside(false, peer, move |mut host| {
            let result = if gathers { host.all_gather(vec![]).map(drop) } else { sum(&mut host) };
            drop(over);
            result.unwrap_err()
        });
        assert!(
            matches!(&error, CollectiveError::OutOfStep { rank: 1, theirs, .. } if theirs.contains(word)),
            "{error}"
        );
    }
}

#[test]
fn a_wrong_token_or_number_is_no_rank() {
    let server = server();
    let patience = Duration::from_millis(400);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let meeting = Meeting { rank: 0, size: 2, one_machine: true, store: connect(&server), patience };
            Host::join(meeting, PATIENCE).unwrap_err()
        });
        let (address, hello) = greeting(&server);
        let strangers: Vec<Stream> = [7, 8, 16, 19]
            .iter()
            .map(|&at| {
                let mut hello = hello.clone();
                hello[at] ^= 1;
                let stream = Stream::connect(&address, PATIENCE).unwrap();
                say(&stream, &hello, false);
                stream
            })
            .collect();
        let error = first.join().unwrap();
        assert!(matches!(&error, MeetingError::Missing { missing, .. } if *missing == [1]), "{error}");
        drop(strangers);
    });
}

#[test]
fn a_rank_that_cannot_share_memory_brings_all_to_sockets_and_says_so() {
    // What it passes instead of a window: nothing, or a file of another kind.
    let null = std::fs::File::open("/dev/null").unwrap();
    for (file, reason) in [(None, "rank 1 shares no memory"), (Some(&null), "rank 1's memory cannot be read")] {
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let peer = move |stream: Stream| {
            stream.pass(1, file.map(AsFd::as_fd)).unwrap();
            let refusal = b"none here";
            let length = (refusal.len() as u64).to_le_bytes();
            say(&stream, &[&header(0, 8, 3), &length[..], &header(0, 9, 2), refusal].concat(), false);
            let _ = wait.recv();
        };
        let notice = beside(true, peer, move |host| {
            drop(over);
            host.notice().unwrap().to_string()
        });
        assert!(notice.contains(reason) && notice.starts_with("sums go through sockets"), "{notice}");
    }
}

#[test]
fn a_place_outside_a_ranks_memory_is_refused() {
    for place in [u64::MAX, u64::MAX - 3, 1 << 36, 2] {
        let (over, wait) = std::sync::mpsc::channel::<()>();
        let peer = move |stream: Stream| {
            let window = Window::create().unwrap();
            stream.pass(1, Some(window.file())).unwrap();
            let agreed = [header(0, 8, 3), 0u64.to_le_bytes().to_vec(), header(0, 0, 2)].concat();
            let offer = [header(1, 400, 4), place.to_le_bytes().to_vec()].concat();
            say(&stream, &[agreed, offer].concat(), false);
            let _ = wait.recv();
        };
        let error = beside(true, peer, move |mut host| {
            assert_eq!(host.notice(), None);
            let error = sum(&mut host).unwrap_err();
            drop(over);
            error
        });
        assert!(matches!(&error, CollectiveError::OutOfStep { rank: 1, .. }), "{error}");
    }
}

#[test]
fn more_than_ranks_tell_each_other_is_refused_before_it_is_sent() {
    let results = world(2, PATIENCE, |mut host| {
        let error = host.all_gather(vec![0; MAX_BYTES as usize + 1]).unwrap_err();
        assert!(matches!(error, CollectiveError::TooLong { .. }), "{error}");
        host.all_gather(vec![host.rank() as u8; MAX_BYTES as usize]).unwrap().len()
    });
    assert_eq!(results, [2, 2]);
}
