//! The sum over ranks that are processes of this machine: all of a model's gradients, in buckets as a program has them (1 MiB, then 25
//! MiB each) and as one. Nothing is computed beside it, so this is what a step would wait if it could hide none.
//!
//! `cargo bench --bench all_reduce -- [ranks] [million floats] [rounds] [tcp]`
//!
//! A round's time is that of its slowest rank; GB/s are bytes of gradients over its median. The time a rank's threads computed (cpu) is
//! what it would take where nothing else runs and each rank has a core, and says most on a busy machine.

use ddpm_dist::collective::host::{Host, Meeting};
use ddpm_dist::collective::{Collective, Exchange};
use ddpm_dist::device::cpu::Cpu;
use ddpm_dist::device::{BufferId, Device};
use ddpm_dist::rendezvous::store::{Client, Server};
use std::error::Error;
use std::ops::Range;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// Tells a process that it is a rank: its number and the store's port.
const RANK: &str = "ALL_REDUCE_RANK";

#[derive(Clone, Copy)]
struct Plan {
    ranks: usize,
    floats: usize,
    rounds: usize,
    tcp: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let number = |i: usize, or: f64| arguments.get(i).and_then(|a| a.parse().ok()).unwrap_or(or);
    let plan = Plan {
        ranks: number(0, 2.0) as usize,
        floats: (number(1, 35.7) * 1e6) as usize,
        rounds: number(2, 20.0) as usize,
        tcp: arguments.iter().any(|a| a == "tcp"),
    };
    if let Ok(place) = std::env::var(RANK) {
        let (rank, port) = place.split_once('@').ok_or("rank@port")?;
        return work(rank.parse()?, port.parse()?, plan);
    }
    let store = Server::listen(([127, 0, 0, 1], 0).into())?;
    let port = store.address().port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args().skip(1)).env(RANK, format!("{rank}@{port}")).spawn()
    };
    let ranks: Vec<Child> = (0..plan.ranks).map(start).collect::<Result<_, _>>()?;
    for mut rank in ranks {
        rank.wait()?;
    }
    Ok(())
}

/// What one rank does.
fn work(rank: usize, port: u16, plan: Plan) -> Result<(), Box<dyn Error>> {
    let Plan { ranks: size, floats, rounds, tcp } = plan;
    let store = Client::connect("127.0.0.1", port, "/bench/", PATIENCE)?;
    let mut host = Host::join(Meeting { rank, size, one_machine: !tcp, store, patience: PATIENCE }, PATIENCE)?;
    let mut device = Device::Cpu(Cpu::new(1));
    let buffer = device.allocate(4 * floats)?;
    if rank == 0 {
        println!("{size} ranks, {:.1} MB of gradients, {rounds} rounds", 4e-6 * floats as f64);
    }
    let buckets = |first: usize, other: usize| {
        let mut ranges = Vec::new();
        let mut start = 0;
        while start < floats {
            let bytes = if start == 0 { first } else { other };
            let end = (start + bytes / 4).min(floats);
            ranges.push(start..end);
            start = end;
        }
        ranges
    };
    for (name, ranges) in [("1 + 25 MiB", buckets(1 << 20, 25 << 20)), ("one bucket", buckets(4 * floats, 4 * floats))]
    {
        let (mut times, mut computed) = (Vec::new(), 0.0);
        for _ in 0..rounds + 2 {
            device.upload(buffer, 0, &vec![rank as f32 + 1.0; floats]).unwrap();
            if times.len() == 2 {
                computed = 0.0;
            }
            let before = cpu();
            let mine = once(&mut host, &mut device, buffer, &ranges)?;
            computed += cpu() - before;
            let all = host.all_gather(mine.to_le_bytes().to_vec())?;
            let slowest =
                all.into_iter().filter_map(|t| Some(f64::from_le_bytes(t.try_into().ok()?))).fold(0.0, f64::max);
            times.push(slowest);
        }
        let mut sums = vec![0.0f32; floats];
        device.download(buffer, 0, &mut sums).unwrap();
        let expected = (size * (size + 1) / 2) as f32;
        assert!(sums.iter().all(|x| *x == expected), "the sums are wrong");
        // The first rounds take their memory from the system.
        let (first, times) = (times[0], &mut times[2..]);
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[(part * (times.len() - 1) as f64).round() as usize];
        if rank == 0 {
            let speed = 4e-9 * floats as f64 / at(0.5);
            println!(
                "{name:<12} median {:.4} s  p10 {:.4}  p90 {:.4}  best {:.4}  first {first:.4}  cpu {:.4}   {speed:.2} GB/s",
                at(0.5),
                at(0.1),
                at(0.9),
                at(0.0),
                computed / rounds as f64,
            );
        }
    }
    Ok(())
}

/// Seconds that one sum of all ranges takes.
fn once(
    host: &mut Host,
    device: &mut Device,
    buffer: BufferId,
    ranges: &[Range<usize>],
) -> Result<f64, Box<dyn Error>> {
    host.barrier()?;
    let start = Instant::now();
    for range in ranges {
        host.start(Exchange::AllReduce, device, buffer, range.clone())?;
    }
    for range in ranges {
        host.wait(Exchange::AllReduce, device, buffer, range.clone())?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds that all threads of this process have computed.
fn cpu() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<u64>().ok()
    });
    1e-9 * nanoseconds.sum::<u64>() as f64
}
