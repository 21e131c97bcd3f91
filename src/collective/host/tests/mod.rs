//! Ranks as threads of this process, over real sockets.

mod hostile;

use super::stream::Stream;
use super::*;
use crate::collective::sum_along_tree;
use crate::device::cpu::Cpu;
use crate::rendezvous::store::{Client, Server};
use crate::rendezvous::testing::{client, server};
use std::io::Write;
use std::time::Instant;

const PATIENCE: Duration = Duration::from_secs(20);

fn connect(server: &Server) -> Client {
    client(server.address().port(), "test/")
}

fn join(server: &Server, rank: usize, size: usize, deadline: Duration) -> Result<Host, MeetingError> {
    join_by(server, true, rank, size, deadline)
}

fn join_by(
    server: &Server,
    one_machine: bool,
    rank: usize,
    size: usize,
    deadline: Duration,
) -> Result<Host, MeetingError> {
    let store = connect(server);
    Host::join(Meeting { rank, size, one_machine, store, patience: PATIENCE }, deadline)
}

/// Runs `work` as every rank of a world; gives what each returns.
fn world<T: Send>(size: usize, deadline: Duration, work: impl Fn(Host) -> T + Sync) -> Vec<T> {
    world_by(true, size, deadline, work)
}

/// The same with shared memory, or as if the ranks were on several machines.
fn world_by<T: Send>(one_machine: bool, size: usize, deadline: Duration, work: impl Fn(Host) -> T + Sync) -> Vec<T> {
    let server = server();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size)
            .map(|rank| {
                let (server, work) = (&server, &work);
                scope.spawn(move || work(join_by(server, one_machine, rank, size, deadline).unwrap()))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Values of a rank whose sum depends on the order.
fn values(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((rank * 7919 + i) as f32 * 0.37).sin() * 10f32.powi((rank as i32 * 3) % 7)).collect()
}

#[test]
fn sums_are_those_of_the_tree_at_every_rank_through_memory_and_through_sockets() {
    for (size, one_machine) in [1, 2, 3, 4, 5, 7, 8].into_iter().flat_map(|size| [(size, true), (size, false)]) {
        // Buckets of odd lengths, shorter than the ranks are many too, begun before the first is waited for; and again, in the same
        // memory.
        let lens = [1000, 1, 17, 4096 + 5, 33, 40_001, 0];
        let total: usize = lens.iter().sum();
        let results = world_by(one_machine, size, PATIENCE, |mut host| {
            assert_eq!((host.shared.is_some(), host.notice()), (one_machine && size > 1, None));
            let mut device = Device::Cpu(Cpu::new(1));
            let buffer = device.allocate(4 * total).unwrap();
            let ranges: Vec<Range<usize>> = lens
                .iter()
                .scan(0, |end, len| {
                    *end += len;
                    Some(*end - len..*end)
                })
                .collect();
            for round in 0..3 {
                device.upload(buffer, 0, &values(host.rank() + round, total)).unwrap();
                for range in &ranges {
                    host.start(Exchange::AllReduce, &mut device, buffer, range.clone()).unwrap();
                }
                for range in &ranges {
                    host.wait(Exchange::AllReduce, &mut device, buffer, range.clone()).unwrap();
                }
            }
            let pages: usize = lens.iter().map(|len: &usize| (4 * len.max(&1)).next_multiple_of(4096)).sum();
            assert!(host.shared.as_ref().is_none_or(|shared| shared.window.taken() == pages), "memory of one round");
            let mut sums = vec![0.0f32; total];
            device.download(buffer, 0, &mut sums).unwrap();
            sums
        });
        let mut parts: Vec<Vec<f32>> = (0..size).map(|rank| values(rank + 2, total)).collect();
        sum_along_tree(&mut parts);
        for (rank, sums) in results.iter().enumerate() {
            let is_same = sums.iter().zip(&parts[0]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(is_same, "rank {rank} of {size}, one machine: {one_machine}");
        }
    }
}

#[test]
fn slices_are_summed_and_gathered_through_memory_and_through_sockets() {
    for (size, one_machine) in [1, 2, 3, 4, 8].into_iter().flat_map(|size| [(size, true), (size, false)]) {
        // Of lengths that nothing but the number of ranks divides, several under way at a time; and again.
        let ranges = [0..5 * size, 7 * size..7 * size, 7 * size..8 * size, 9 * size..9010 * size];
        let len = 9020 * size;
        let all = world_by(one_machine, size, PATIENCE, |mut host| {
            let mut device = Device::Cpu(Cpu::new(1));
            let [floats, bytes] = [4 * len, len].map(|bytes| device.allocate(bytes).unwrap());
            for round in 0..2 {
                device.upload(floats, 0, &values(host.rank() + round, len)).unwrap();
                device.upload(bytes, 0, &vec![host.rank() as u8 + 1; len]).unwrap();
                for range in &ranges {
                    host.start(Exchange::ReduceScatter, &mut device, floats, range.clone()).unwrap();
                    host.start(Exchange::AllGather, &mut device, bytes, range.clone()).unwrap();
                }
                for range in &ranges {
                    host.wait(Exchange::ReduceScatter, &mut device, floats, range.clone()).unwrap();
                    host.wait(Exchange::AllGather, &mut device, bytes, range.clone()).unwrap();
                }
            }
            let (mut sums, mut given) = (vec![0.0f32; len], vec![0u8; len]);
            device.download(floats, 0, &mut sums).unwrap();
            device.download(bytes, 0, &mut given).unwrap();
            (sums, given)
        });
        let mut parts: Vec<Vec<f32>> = (0..size).map(|rank| values(rank + 1, len)).collect();
        sum_along_tree(&mut parts);
        for (rank, (sums, given)) in all.iter().enumerate() {
            for range in &ranges {
                let own = slice_of(range, rank, size);
                assert_eq!(sums[own.clone()], parts[0][own], "{range:?} of rank {rank} of {size}");
                for other in 0..size {
                    let of_other = slice_of(range, other, size);
                    assert!(given[of_other].iter().all(|byte| *byte == other as u8 + 1), "{range:?}, {rank}");
                }
            }
            assert_eq!(given[5 * size], rank as u8 + 1, "beside a range nothing changes");
        }
    }
}

#[test]
fn sums_that_follow_each_other_without_end_take_bounded_memory() {
    let taken = world(3, PATIENCE, |mut host| {
        let mut device = Device::Cpu(Cpu::new(1));
        let buffer = device.allocate(4 * 2000).unwrap();
        device.upload(buffer, 0, &vec![1.0f32; 2000]).unwrap();
        let half = |i: usize| 1000 * (i % 2)..1000 * (i % 2 + 1);
        host.start(Exchange::AllReduce, &mut device, buffer, half(0)).unwrap();
        for i in 0..200 {
            // There is always one under way.
            host.start(Exchange::AllReduce, &mut device, buffer, half(i + 1)).unwrap();
            host.wait(Exchange::AllReduce, &mut device, buffer, half(i)).unwrap();
        }
        host.wait(Exchange::AllReduce, &mut device, buffer, half(200)).unwrap();
        host.shared.as_ref().unwrap().window.taken() / 4096
    });
    assert!(taken.iter().all(|pages| *pages <= 2 * (TAKEN + 1)), "{taken:?}");
}

#[test]
fn bytes_are_gathered() {
    let results = world(3, PATIENCE, |mut host| {
        let mine = vec![host.rank() as u8; 10 * host.rank()];
        let all = host.all_gather(mine).unwrap();
        host.barrier().unwrap();
        all
    });
    for result in results {
        assert_eq!(result, [vec![], vec![1; 10], vec![2; 20]]);
    }
}

#[test]
fn a_rank_that_is_gone_is_named() {
    let results =
        world(3, PATIENCE, |mut host| if host.rank() == 1 { None } else { Some(host.barrier().unwrap_err()) });
    for error in results.into_iter().flatten() {
        assert!(matches!(error, CollectiveError::PeerLost { rank: 1, .. }), "{error}");
    }
}

#[test]
fn a_rank_that_is_silent_is_named_at_the_deadline() {
    let deadline = Duration::from_millis(300);
    let (silence, speak) = std::sync::mpsc::channel::<()>();
    let speak = std::sync::Mutex::new(speak);
    let silence = std::sync::Mutex::new(Some(silence));
    let results = world(2, deadline, |mut host| {
        if host.rank() == 1 {
            // Its connection stays open until rank 0 has given up.
            let _ = speak.lock().unwrap().recv();
            return None;
        }
        let start = Instant::now();
        let error = host.barrier().unwrap_err();
        let again = host.barrier().unwrap_err();
        drop(silence.lock().unwrap().take());
        Some((error, again, start.elapsed()))
    });
    let (error, again, after) = results.into_iter().flatten().next().unwrap();
    assert!(matches!(&error, CollectiveError::TimedOut { ranks, .. } if *ranks == [1]), "{error}");
    assert!(matches!(again, CollectiveError::Ended), "{again}");
    assert!(after >= deadline && after < PATIENCE);
}

#[test]
fn ranks_that_do_different_things_are_told_so() {
    let results = world(2, PATIENCE, |mut host| {
        let mut device = Device::Cpu(Cpu::new(1));
        let len = 100 + 50 * host.rank();
        let buffer = device.allocate(4 * len).unwrap();
        host.start(Exchange::AllReduce, &mut device, buffer, 0..len).unwrap();
        host.wait(Exchange::AllReduce, &mut device, buffer, 0..len).unwrap_err()
    });
    // Either may hang up on the other first.
    assert!(results.iter().any(|e| matches!(e, CollectiveError::OutOfStep { .. })), "{results:?}");
    assert!(results.iter().all(|e| matches!(e, CollectiveError::OutOfStep { .. } | CollectiveError::PeerLost { .. })));
}

#[test]
fn two_ranks_with_one_number_are_refused() {
    let server = server();
    let mut store = connect(&server);
    store.add("collective/claim/0", 1).unwrap();
    assert!(matches!(join(&server, 0, 2, PATIENCE), Err(MeetingError::Twice { rank: 0 })));
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let server = server();
    let patience = Duration::from_millis(100);
    let meeting = Meeting { rank: 0, size: 4, one_machine: true, store: connect(&server), patience };
    match Host::join(meeting, PATIENCE).unwrap_err() {
        MeetingError::Missing { missing, .. } => assert_eq!(missing, [1, 2, 3]),
        other => panic!("{other}"),
    }
    let meeting = Meeting { rank: 3, size: 4, one_machine: true, store: connect(&server), patience };
    let error = Host::join(meeting, PATIENCE).unwrap_err();
    assert!(matches!(&error, MeetingError::Missing { .. } | MeetingError::Unreachable { peer: 0, .. }), "{error}");
}

#[test]
fn a_rank_that_is_not_where_it_said_is_named_with_its_address() {
    let server = server();
    let mut store = connect(&server);
    store.set("collective/token", b"12345678").unwrap();
    store.set("collective/address/0", b"unix:nobody-listens-here").unwrap();
    let error = join(&server, 1, 2, PATIENCE).unwrap_err();
    assert!(matches!(error, MeetingError::Unreachable { peer: 0, .. }), "{error}");
    assert!(error.to_string().contains("rank 0 cannot be reached at unix:nobody-listens-here"), "{error}");
}

#[test]
fn strangers_do_not_keep_ranks_from_meeting() {
    let server = server();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join(&server, 0, 2, PATIENCE).unwrap());
        let address = connect(&server).get("collective/address/0", PATIENCE).unwrap();
        let address = String::from_utf8(address).unwrap();
        for garbage in
            [&b"GET / HTTP/1.1\r\n\r\n padding padding"[..], b"short", &[0xff; 64], b"ddpm-co1........\x01\0\0\0"]
        {
            let stream = Stream::connect(&address, PATIENCE).unwrap();
            (&stream).write_all(garbage).unwrap();
        }
        let second = scope.spawn(|| join(&server, 1, 2, PATIENCE).unwrap());
        let (mut first, mut second) = (first.join().unwrap(), second.join().unwrap());
        let other = scope.spawn(move || second.barrier());
        first.barrier().unwrap();
        other.join().unwrap().unwrap();
    });
}
