//! Sums between GPUs of several processes, and what becomes of the others when one of them fails.
//!
//! A rank is this test program itself, told by its environment to run [`a_rank`] instead, with the libraries of the machine made of software.

use crate::build::Build;
use crate::machine::{library_path, not_tested};
use crate::values::rounded;
use ddpm_dist::collective::host::{Host, Meeting};
use ddpm_dist::collective::nccl::Nccl;
use ddpm_dist::collective::{Adding, Collective, Exchange, sum_along_tree};
use ddpm_dist::device::cuda::{Cuda, Image};
use ddpm_dist::device::{BufferId, Device, Precision};
use ddpm_dist::rendezvous::store::{Client, Server};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const LIBRARIES: [Build; 4] = [Build::BareDriver, Build::Cudnn, Build::CublasLt, Build::Nccl];
/// The same with this program's kernels.
pub const WITH_KERNELS: [Build; 4] = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];
/// For ranks to come and, in most tests, for anything: more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where a rank that does not come is waited for.
const SHORT: Duration = Duration::from_secs(2);

/// The environment of a rank: number, size, port of the store, deadline in ms, steps, how it adds up.
const PLACE: &str = "NCCL_RANKS_PLACE";
/// How far a rank goes before it does nothing more for ever.
const STOPS_AT: &str = "NCCL_RANKS_STOPS_AT";

const FLOATS: usize = 100_003;
const CUTS: [usize; 4] = [0, 50_000, 60_004, FLOATS];

pub struct World {
    /// The test that a rank is.
    pub rank: &'static str,
    pub size: usize,
    pub deadline: Duration,
    /// 0 for as many as there can be.
    pub steps: usize,
    /// "fast", "bf16" or "tree".
    pub adding: &'static str,
    pub libraries: &'static [Build],
    /// Variables for some ranks.
    pub settings: Vec<(usize, &'static str, &'static str)>,
}

pub const FINE: World = World {
    rank: "nccl::a_rank",
    size: 2,
    deadline: PATIENCE,
    steps: 3,
    adding: "fast",
    libraries: &LIBRARIES,
    settings: Vec::new(),
};

pub struct Ranks(pub Vec<Child>, #[allow(dead_code, reason = "it serves them")] Server);

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.0 {
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// What a rank said.
pub struct Said {
    pub out: String,
    err: String,
    is_success: bool,
}

impl World {
    /// Nothing where there is a real GPU: one is too few.
    pub fn start(&self) -> Option<Ranks> {
        if std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
            not_tested("sums between GPUs need several");
            return None;
        }
        let server = Server::listen(([127, 0, 0, 1], 0).into()).unwrap();
        let (port, path) = (server.address().port(), library_path(self.libraries));
        let World { rank: test, size, deadline, steps, adding, ref settings, .. } = *self;
        let start = |rank| {
            let place = format!("{rank} {size} {port} {} {steps} {adding}", deadline.as_millis());
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--ignored", "--exact", test, "--nocapture", "--test-threads=1"]);
            command.env(PLACE, place).env("LD_LIBRARY_PATH", &path);
            command.envs(settings.iter().filter(|(of, ..)| *of == rank).map(|(_, name, value)| (name, value)));
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        Some(Ranks((0..size).map(start).collect(), server))
    }

    /// Runs all ranks to their ends.
    pub fn run(&self) -> Vec<Said> {
        self.start().map_or(Vec::new(), |mut ranks| (0..self.size).map(|rank| ranks.end_of(rank)).collect())
    }
}

impl Ranks {
    /// Waits until all have been through some steps.
    pub fn at_work(mut self) -> Ranks {
        for rank in &mut self.0 {
            until(rank.stdout.as_mut().unwrap(), "at work\n");
        }
        self
    }

    /// What it says from now on, and how it ends.
    pub fn end_of(&mut self, rank: usize) -> Said {
        let child = &mut self.0[rank];
        // It says little on standard error: it does not wait for a reader there.
        let (mut out, mut err) = (String::new(), String::new());
        if let Some(mut left) = child.stdout.take() {
            left.read_to_string(&mut out).unwrap();
        }
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        Said { out, err, is_success: child.wait().unwrap().success() }
    }

    pub fn signal(&self, rank: usize, signal: Signal) {
        kill_process(Pid::from_child(&self.0[rank]), signal).unwrap();
    }
}

/// Reads byte by byte: what follows is read later.
fn until(from: &mut ChildStdout, word: &str) {
    let mut said = String::new();
    while !said.ends_with(word) {
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error}; it said {said}"));
        said.push(byte[0].into());
    }
}

impl Said {
    pub fn says(&self, words: &str) -> bool {
        self.out.contains(words) || self.err.contains(words)
    }

    pub fn assert(&self, rank: usize, words: &[&str]) {
        let all = format!("{}{}", self.out, self.err);
        assert!(self.is_success && !all.contains("panicked"), "rank {rank}: {all}");
        for word in words {
            assert!(all.contains(word), "rank {rank} does not say '{word}': {all}");
        }
    }
}

/// Whole numbers, whose sums have no rounding; for a fixed order, and in bf16, numbers whose sums have.
pub fn value(rank: usize, step: usize, i: usize, adding: Adding) -> f32 {
    let whole = ((i * (rank + 1) + 7 * step) % 1000) as f32;
    if adding == Adding::Fast { whole } else { whole * 0.1 + 1e-3 }
}

fn step(nccl: &mut Nccl, device: &mut Device, buffer: BufferId, mine: &[f32]) -> Result<Vec<f32>, String> {
    device.upload(buffer, 0, mine).unwrap();
    let buckets = || CUTS.windows(2).map(|cuts| cuts[0]..cuts[1]);
    for bucket in buckets() {
        nccl.start(Exchange::AllReduce, device, buffer, bucket).map_err(|error| error.to_string())?;
    }
    for bucket in buckets() {
        nccl.wait(Exchange::AllReduce, device, buffer, bucket).map_err(|error| error.to_string())?;
    }
    nccl.note_sums().map_err(|error| error.to_string())?;
    nccl.settle().map_err(|error| error.to_string())?;
    let mut sum = vec![0.0; FLOATS];
    device.download(buffer, 0, &mut sum).unwrap();
    Ok(sum)
}

/// Where a rank is, as its environment says.
pub struct Place {
    pub size: usize,
    /// 0 for as many as there can be.
    pub steps: usize,
    pub adding: Adding,
}

impl Place {
    /// Nothing where this process is no rank. The rank has met the others, on the host.
    pub fn meet() -> Option<(Place, Nccl)> {
        let place = std::env::var(PLACE).ok()?;
        let place: Vec<&str> = place.split(' ').collect();
        let number = |i: usize| place[i].parse::<usize>().unwrap();
        let (rank, size, port, steps) = (number(0), number(1), number(2) as u16, number(4));
        let deadline = Duration::from_millis(number(3) as u64);
        let store = Client::connect("127.0.0.1", port, "/test/", PATIENCE).unwrap();
        let meeting = Meeting { rank, size, one_machine: true, store, patience: PATIENCE };
        let mut nccl = Nccl::over(Host::join(meeting, deadline).unwrap(), deadline);
        let adding = match place[5] {
            "fast" => Adding::Fast,
            "bf16" => Adding::FastInBf16,
            _ => Adding::Tree,
        };
        nccl.choose(adding);
        Some((Place { size, steps, adding }, nccl))
    }

    /// Lets a rank do what `step` does with the number of each step, until it has done all; says that it is at work, and how it ends.
    pub fn work(&self, nccl: &mut Nccl, mut step: impl FnMut(&mut Nccl, usize) -> Result<(), String>) {
        let end = Instant::now() + PATIENCE;
        for number in 0.. {
            if number == 5 {
                tell("at work");
                stops_at("a sum");
            }
            if self.steps > 0 && number == self.steps {
                break;
            }
            assert!(Instant::now() < end, "the test has forgotten this rank");
            if let Err(error) = step(nccl, number) {
                tell(&format!("ended: {error}"));
                return;
            }
        }
        // Nobody goes before all have their sums.
        nccl.host().barrier().unwrap();
        tell("ended: well");
    }
}

/// Does nothing more for ever, where the test wants it here.
fn stops_at(what: &str) {
    if std::env::var(STOPS_AT).is_ok_and(|at| at == what) {
        tell(&format!("stops at {what}"));
        let _ = std::io::stdin().lines().count();
    }
}

/// The rank that the tests below start.
#[test]
#[ignore = "is started by the tests below"]
fn a_rank() {
    let Some((place, mut nccl)) = Place::meet() else { return };
    let open = if place.adding == Adding::Fast { Cuda::without_kernels } else { Cuda::open };
    let mut device = Device::Cuda(Box::new(open(0).unwrap()));
    let buffer = device.allocate(4 * FLOATS).unwrap();
    stops_at("the meeting");
    if let Err(error) = nccl.join_gpus(&mut device) {
        tell(&format!("ended: {error}"));
        return;
    }
    if let Some(notice) = nccl.notice() {
        tell(&format!("notice: {notice}"));
    }
    nccl.reserve(&mut device, CUTS.windows(2).map(|cuts| cuts[1] - cuts[0]).max().unwrap()).unwrap();
    let floats = |rank, number| (0..FLOATS).map(|i| value(rank, number, i, place.adding)).collect::<Vec<f32>>();
    place.work(&mut nccl, |nccl, number| {
        let sum = step(nccl, &mut device, buffer, &floats(nccl.rank(), number))?;
        let mut all: Vec<Vec<f32>> = (0..place.size).map(|rank| floats(rank, number)).collect();
        if place.adding == Adding::FastInBf16 {
            let bf16 = |x: f32| rounded(x, Precision::Bf16);
            let sum = |i: usize| all.iter().map(|part| bf16(part[i])).reduce(|sum, x| bf16(sum + x)).unwrap();
            all[0] = (0..FLOATS).map(sum).collect();
        } else {
            sum_along_tree(&mut all);
        }
        let wrong = (0..FLOATS).find(|&i| sum[i].to_bits() != all[0][i].to_bits());
        assert_eq!(wrong, None, "step {number}");
        Ok(())
    });
}

/// To the test, which may have heard enough.
pub fn tell(what: &str) {
    let _ = writeln!(std::io::stdout(), "{what}").and_then(|()| std::io::stdout().flush());
}

/// What a rank says when it ends, and when that was.
pub fn last_words(rank: &mut Child, since: Instant) -> (String, Duration) {
    // It may say more later.
    let lines = BufReader::new(rank.stdout.as_mut().unwrap()).lines();
    let end = lines.map_while(Result::ok).find(|line| line.contains("ended: "));
    (end.unwrap_or_default(), since.elapsed())
}

#[test]
fn gpus_sum_up_what_their_ranks_have() {
    for size in [2, 4] {
        for (rank, said) in (World { size, ..FINE }).run().iter().enumerate() {
            said.assert(rank, &["ended: well", "has left its communicator"]);
            assert!(!said.out.contains("notice: "), "{}", said.out);
        }
    }
}

#[test]
fn a_fixed_order_has_the_bits_of_the_host() {
    if Image::embedded().is_none() {
        return not_tested("sums along a tree need kernels: built without nvcc");
    }
    for size in [2, 3, 4, 8] {
        let world = World { size, adding: "tree", libraries: &WITH_KERNELS, ..FINE };
        for (rank, said) in world.run().iter().enumerate() {
            said.assert(rank, &["ended: well", "has left its communicator"]);
            assert!(!said.out.contains("notice: "), "{}", said.out);
        }
    }
}

#[test]
fn gradients_in_bf16_are_rounded_where_they_are_added() {
    if Image::embedded().is_none() {
        return not_tested("sums in bf16 need kernels: built without nvcc");
    }
    for (rank, said) in (World { adding: "bf16", libraries: &WITH_KERNELS, ..FINE }).run().iter().enumerate() {
        said.assert(rank, &["ended: well", "has left its communicator"]);
    }
}

#[test]
fn where_a_rank_has_no_nccl_the_host_sums_up() {
    const WITHOUT: [Build; 3] = [Build::BareDriver, Build::Cudnn, Build::CublasLt];
    for (rank, said) in (World { libraries: &WITHOUT, ..FINE }).run().iter().enumerate() {
        said.assert(rank, &["ended: well", "rank 0 says there is no NCCL 2 here (libnccl.so.2", "nvidia-nccl-cu13"]);
    }
    for (version, what) in [("22805", "rank 1 says this is NCCL 2.28.5"), ("22900", "rank 1 2.29.0")] {
        let settings = vec![(1, "CUDA_SIM_NCCL_VERSION", version)];
        for (rank, said) in (World { settings, ..FINE }).run().iter().enumerate() {
            said.assert(rank, &["ended: well", what]);
        }
    }
    for said in (World { settings: vec![(0, "CUDA_SIM_NCCL_FAIL", "ncclGetUniqueId")], ..FINE }).run() {
        said.assert(0, &["ended: well", "rank 0 says NCCL 2.29.2 cannot name a communicator", "no socket interface"]);
    }
}

#[test]
fn a_killed_rank_is_named_within_five_seconds() {
    for victim in [0, 2] {
        let Some(ranks) = (World { size: 3, steps: 0, ..FINE }).start() else { return };
        let mut ranks = ranks.at_work();
        let start = Instant::now();
        ranks.signal(victim, Signal::KILL);
        for rank in (0..3).filter(|rank| *rank != victim) {
            let (said, after) = last_words(&mut ranks.0[rank], start);
            assert!(said.contains(&format!("rank {victim} was lost")), "rank {rank}: {said}");
            assert!(after < Duration::from_secs(5), "{after:?}");
        }
    }
}

#[test]
fn a_stopped_rank_is_named_at_the_deadline() {
    let Some(ranks) = (World { size: 3, steps: 0, deadline: SHORT, ..FINE }).start() else { return };
    let mut ranks = ranks.at_work();
    let start = Instant::now();
    ranks.signal(1, Signal::STOP);
    assert_named(&mut ranks, 1, start);
}

#[test]
fn a_rank_that_never_comes_is_named_at_the_deadline() {
    for stop in ["the meeting", "a sum"] {
        let settings = vec![(1, STOPS_AT, stop)];
        let Some(mut ranks) = (World { size: 3, steps: 0, deadline: SHORT, settings, ..FINE }).start() else { return };
        until(ranks.0[1].stdout.as_mut().unwrap(), &format!("stops at {stop}\n"));
        let start = Instant::now();
        assert_named(&mut ranks, 1, start);
    }
}

/// All others name the one that does not answer, or learn that from the first that does.
fn assert_named(ranks: &mut Ranks, silent: usize, start: Instant) {
    for rank in (0..ranks.0.len()).filter(|rank| *rank != silent) {
        let (said, after) = last_words(&mut ranks.0[rank], start);
        let is_named = said.contains(&format!("ranks [{silent}] did not answer"))
            || said.contains(&format!("rank {silent} was lost"));
        assert!(is_named, "rank {rank}: {said}");
        assert!(after < SHORT + Duration::from_secs(2), "{after:?}");
    }
}

#[test]
fn an_error_of_nccl_is_told_by_its_rank_and_names_it_to_the_others() {
    for (fault, words) in [
        ("ncclCommInitRankConfig", ["join the other GPUs", "Connection refused"]),
        ("join", ["unhandled system error", "closed by remote peer"]),
        ("ncclAllReduce", ["cannot sum up 50000 floats", "(3)"]),
        ("sum", ["remote process exited", "status=12"]),
    ] {
        let settings = vec![(1, "CUDA_SIM_NCCL_FAIL", fault)];
        let said = (World { size: 3, settings, ..FINE }).run();
        for (rank, said) in said.iter().enumerate() {
            match rank {
                1 => said.assert(rank, &["ended: NCCL 2.29.2 cannot", words[0], words[1]]),
                _ => said.assert(rank, &["ended: rank 1 was lost", "has aborted its communicator"]),
            }
        }
    }
}

#[test]
fn gpus_that_hang_though_all_ranks_are_there_are_told_at_the_deadline() {
    let world = World { deadline: SHORT, settings: vec![(1, "CUDA_SIM_NCCL_FAIL", "deaf")], ..FINE };
    for (rank, said) in world.run().iter().enumerate() {
        let stuck = said.out.contains("cannot finish sums between GPUs within 2 s: all ranks wait for it");
        // Whoever looks a moment later finds the other gone.
        assert!(stuck || said.out.contains("was lost"), "rank {rank}: {}", said.out);
        said.assert(rank, &["has aborted its communicator"]);
    }
}

#[test]
fn a_communicator_that_cannot_be_left_is_aborted() {
    let said = (World { settings: vec![(1, "CUDA_SIM_NCCL_FAIL", "leave")], ..FINE }).run();
    for (rank, said) in said.iter().enumerate() {
        // Rank 0 leaves when all do, or in vain.
        said.assert(rank, &["ended: well", "has aborted its communicator"]);
    }
}
