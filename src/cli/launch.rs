//! `--ranks` and `--gpus`: whether this process is a rank, or starts ranks.

use super::exit::{self, Code, Failure, OrFail};
use super::{Command, Common};
use crate::cluster::launcher::{self, Codes, Inbox, Job, LaunchError, Timing, Voice, launch};
use crate::device::cuda::Gpu;
use crate::rendezvous::{
    Detected, Environment, Launcher, MAX_RANKS, Node, OWN_RUN_ID, World, address_of_interface, detect,
};
use crate::train::Share;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Restarts unless --max-restarts says otherwise: none, as with torchrun. A run that fails says so at once; who leaves it alone for days
/// asks for more.
const MAX_RESTARTS: u32 = 0;
/// Seconds that ranks have to save and leave.
const GRACE: u64 = 60;
/// Seconds that nodes wait for each other.
const RDZV_TIMEOUT: u64 = 300;
/// Ranks that a failure leaves over notice it within seconds: their sums have deadlines.
const SETTLE: Duration = Duration::from_secs(5);
/// Silence after which a node counts as gone: beats are half a second apart.
const SILENCE: Duration = Duration::from_secs(10);

/// Options of a launcher. Ranks have them on their command line too, where they mean nothing.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Several ranks")]
pub(super) struct LaunchArguments {
    /// Start N ranks on this machine that work together, on what --device says; `plan` starts none and shows what they would need
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_RANKS as i64))]
    ranks: Option<u16>,
    /// Start N ranks, one per GPU of this machine, as --ranks N --device cuda does
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_RANKS as i64))]
    gpus: Option<u16>,
    /// Number of machines, each with its own launcher [default: 1]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_RANKS as i64))]
    nnodes: Option<u16>,
    /// This machine's number, from 0
    #[arg(long, global = true, value_name = "K")]
    node_rank: Option<u16>,
    /// Where machines meet: node 0's name, and a free port there
    #[arg(long, global = true, value_name = "HOST:PORT", value_parser = meeting_place)]
    rdzv: Option<(String, u16)>,
    /// The network that several machines use: listen there, and tell the others that address [default: all networks; the way to the store]
    #[arg(long, global = true, value_name = "NAME|ADDRESS")]
    interface: Option<String>,
    /// How long ranks and machines wait for each other to come [default: 300]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    rdzv_timeout: Option<u64>,
    /// How often all ranks are started again after one failed; not after errors that would come again [default: 0]
    #[arg(long, global = true, value_name = "R")]
    max_restarts: Option<u32>,
    /// With --max-restarts: go on with fewer ranks, but no fewer than M, where one keeps failing at the same place or a machine is gone;
    /// also begin with fewer where all cannot share the work
    #[arg(long, global = true, value_name = "M", value_parser = clap::value_parser!(u16).range(1..))]
    min_ranks: Option<u16>,
    /// Keep what ranks print: DIR/attempt-0/rank-00003/{stdout,stderr}.log and error.json
    #[arg(long, global = true, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// How long ranks may take to save and leave, before they are killed [default: 60]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    grace: Option<u64>,
}

impl LaunchArguments {
    /// Whether each rank must have a GPU.
    pub fn wants_gpus(&self) -> bool {
        self.gpus.is_some()
    }

    /// How many ranks a command that starts none is to reckon with.
    pub(super) fn planned_ranks(&self) -> Option<usize> {
        self.ranks.map(usize::from)
    }

    /// How long ranks and machines wait for each other to come.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_secs(self.rdzv_timeout.unwrap_or(RDZV_TIMEOUT))
    }

    /// The address of this machine that the others are to use, if one was chosen.
    pub(super) fn interface(&self) -> Result<Option<IpAddr>, Failure> {
        let refused = |error| Failure::new(Code::Usage, format!("--interface: {error}"));
        self.interface.as_deref().map(address_of_interface).transpose().map_err(refused)
    }
}

/// `HOST:PORT`, with an IPv6 address in brackets.
fn meeting_place(text: &str) -> Result<(String, u16), String> {
    let expected = || "expected HOST:PORT, for example node0:29500".to_string();
    let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(expected)?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match bracketed {
        Some(address) => Ok((address.to_string(), port)),
        None if host.is_empty() || host.contains([':', '[', ']']) => Err(expected()),
        None => Ok((host.to_string(), port)),
    }
}

/// What this process is.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    /// It does the work: alone, or as a rank.
    Worker,
    /// It starts ranks: how many here, which node of how many, and where they meet.
    Launcher { ranks: usize, node: usize, nodes: usize, meet: Option<(String, u16)> },
}

/// Whether this process is a rank that our launcher started.
pub(super) fn is_rank_of_ours() -> bool {
    std::env::var_os(OWN_RUN_ID).is_some_and(|id| !id.is_empty())
}

/// Ties a rank to its launcher; see [`launcher::stay_with_launcher`].
pub(super) fn stay_with_launcher() -> Result<(), Failure> {
    match !is_rank_of_ours() || launcher::stay_with_launcher() {
        true => Ok(()),
        false => Err(Failure::new(Code::PeerLost, "the launcher of this rank is gone")),
    }
}

/// Lets the launcher know of a panic too: a mistake of the program is a cause like any other.
pub(super) fn tell_of_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        exit::tell_launcher(exit::PANICKED, &panic.to_string());
    }));
}

/// Starts ranks, if that is what was asked for, and returns when the run is over.
pub(super) fn launch_if_asked(command: &Command, common: &Common) -> Result<Option<ExitCode>, Failure> {
    let flags = &common.launch;
    if let Command::Plan(_) = command {
        return match flags.gpus.map(|_| "--gpus").or(flags.given_beside_number()) {
            Some(option) => Err(Failure::new(
                Code::Usage,
                format!("`plan` starts nothing: leave out {option}; --ranks N plans for N ranks, of CPU cores or GPUs"),
            )),
            None => Ok(None),
        };
    }
    let name = match command {
        Command::Train(_) | Command::Sample(_) | Command::Bench(_) | Command::Plan(_) => None,
        Command::Export(_) => Some("export"),
        Command::Checkpoint(_) => Some("checkpoint"),
        Command::Doctor => Some("doctor"),
    };
    if let Some(name) = name {
        let refused = format!("`{name}` is the work of one process: leave out {}", flags.given().unwrap_or_default());
        return if flags.given().is_some() { Err(Failure::new(Code::Usage, refused)) } else { Ok(None) };
    }
    let detected = match detect(&Environment::of_this_process()) {
        // Options win over an environment that is not understood.
        Err(_) if flags.ranks.or(flags.gpus).is_some() && !is_rank_of_ours() => Detected::Alone,
        detected => detected.or_fail(Code::Usage)?,
    };
    let Role::Launcher { ranks, node, nodes, meet } = role(flags, &detected).or_fail(Code::Usage)? else {
        return Ok(None);
    };
    if flags.wants_gpus() {
        // Once for all ranks.
        let found = Gpu::count().or_fail(Code::Device)?;
        if found < ranks {
            let refused = format!("--gpus {ranks}: this machine has {found}; CUDA_VISIBLE_DEVICES may hide some");
            return Err(Failure::new(Code::Device, refused));
        }
    }
    let program = std::env::current_exe().map_err(|error| {
        Failure::new(Code::Failed, format!("cannot find this program to start it as ranks: {error}"))
    })?;
    let job = Job {
        command: launcher::Command { program, arguments: std::env::args_os().skip(1).collect() },
        ranks,
        node,
        nodes,
        meet,
        interface: flags.interface()?,
        patience: flags.patience(),
        max_restarts: flags.max_restarts.unwrap_or(MAX_RESTARTS),
        min_ranks: flags.min_ranks.map(usize::from),
        log_dir: flags.log_dir.clone(),
        timing: Timing { settle: SETTLE, grace: Duration::from_secs(flags.grace.unwrap_or(GRACE)), silence: SILENCE },
        codes: Codes { meaning: exit::meaning, peer_lost: Code::PeerLost as u8, of_error: |error| code_of(error) },
    };
    let mut inbox = Inbox::new();
    hear_signals(&inbox)?;
    let allowed = allowed(command)?;
    let voice = Voice::of_this_process(common.quiet);
    match launch(&job, &allowed, &voice, &mut inbox) {
        Ok(outcome) => Ok(Some(match outcome.message {
            Some(message) => exit::report(outcome.code, &message),
            None => ExitCode::from(outcome.code),
        })),
        Err(error) => Ok(Some(exit::report(code_of(&error), &error.to_string()))),
    }
}

/// Which numbers of ranks can share a command's work. A config that is wrong is refused here, once.
fn allowed(command: &Command) -> Result<impl Fn(usize) -> bool + use<>, Failure> {
    let config = match command {
        Command::Train(arguments) => Some(arguments.config.load()?.train),
        Command::Bench(arguments) => Some(arguments.config.load()?.train),
        _ => None,
    };
    Ok(move |ranks: usize| config.as_ref().is_none_or(|config| Share::new(config, 0, ranks).is_ok()))
}

/// Brings signals to the launcher, by a thread that waits for them as long as the process lives.
fn hear_signals(inbox: &Inbox) -> Result<(), Failure> {
    use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGUSR2]).or_fail(Code::Failed)?;
    let doorbell = inbox.doorbell();
    let hear = move || signals.forever().for_each(|signal| doorbell.signal(signal));
    std::thread::Builder::new().name("signals".into()).spawn(hear).or_fail(Code::Failed)?;
    Ok(())
}

fn code_of(error: &LaunchError) -> u8 {
    let code = match error {
        LaunchError::Folder { .. }
        | LaunchError::OtherNetwork { .. }
        | LaunchError::Disagree { .. }
        | LaunchError::NotAllowed { .. }
        | LaunchError::TooMany { .. }
        | LaunchError::TooFew { .. } => Code::Usage,
        // Who came before may be about to leave: a pod that Kubernetes replaces.
        LaunchError::Twice { .. }
        | LaunchError::PortTaken { .. }
        | LaunchError::Listen { .. }
        | LaunchError::Store(_)
        | LaunchError::NodesMissing { .. }
        | LaunchError::Garbled { .. } => Code::Rendezvous,
        LaunchError::LeadLost { .. } => Code::PeerLost,
        LaunchError::Stopped(signal_hook::consts::SIGINT) => Code::Interrupted,
        LaunchError::Stopped(_) => Code::Terminated,
    };
    code as u8
}

impl LaunchArguments {
    /// The first option that only a launcher has, if any is given.
    fn given(&self) -> Option<&'static str> {
        let number = match (self.ranks, self.gpus) {
            (Some(_), _) => Some("--ranks"),
            (None, Some(_)) => Some("--gpus"),
            (None, None) => None,
        };
        number.or(self.given_beside_number())
    }

    fn given_beside_number(&self) -> Option<&'static str> {
        [
            ("--nnodes", self.nnodes.is_some()),
            ("--node-rank", self.node_rank.is_some()),
            ("--rdzv", self.rdzv.is_some()),
            ("--max-restarts", self.max_restarts.is_some()),
            ("--min-ranks", self.min_ranks.is_some()),
            ("--log-dir", self.log_dir.is_some()),
            ("--grace", self.grace.is_some()),
        ]
        .into_iter()
        .find_map(|(name, is_given)| is_given.then_some(name))
    }
}

/// What this process is, by its options and its environment.
fn role(flags: &LaunchArguments, detected: &Detected) -> Result<Role, String> {
    if flags.ranks.is_some() && flags.gpus.is_some() {
        return Err("--ranks and --gpus exclude each other: --gpus N is --ranks N --device cuda".into());
    }
    let number = flags.ranks.or(flags.gpus).map(usize::from);
    let nodes = flags.nnodes.map_or(1, usize::from);
    match detected {
        // The launcher's options stand on the command lines of its ranks, too.
        Detected::Rank(World { launcher: Launcher::Own, .. }) => Ok(Role::Worker),
        Detected::Rank(world) => match (number, &flags.rdzv, flags.node_rank) {
            // Whoever says all of it wants a launcher on each node, and something else to start those.
            (Some(ranks), Some(_), Some(_)) => by_flags(flags, ranks, nodes),
            // An interactive session of a batch system looks like a world of one.
            (Some(ranks), _, _) if world.size == 1 => by_flags(flags, ranks, nodes),
            (Some(ranks), _, _) if ranks != world.size && ranks != world.local_size => Err(format!(
                "this process is rank {} of {} that {} started, and --ranks {ranks} would start ranks below it: leave it out, or start \
                 one process per machine with --ranks, --nnodes, --node-rank and --rdzv",
                world.rank,
                world.size,
                name_of(world.launcher),
            )),
            _ => match flags.given_beside_number() {
                Some(option) => Err(format!("{option} is for a launcher, and {} is it here", name_of(world.launcher))),
                None => Ok(Role::Worker),
            },
        },
        Detected::Alone => match (number, flags.given_beside_number()) {
            (Some(ranks), _) => by_flags(flags, ranks, nodes),
            (None, Some(option)) => Err(format!("{option} needs --ranks N: how many ranks to start on this machine")),
            (None, None) => Ok(Role::Worker),
        },
        Detected::Node(of_environment) => by_environment(flags, number, of_environment),
    }
}

fn by_flags(flags: &LaunchArguments, ranks: usize, nodes: usize) -> Result<Role, String> {
    let node = match flags.node_rank.map(usize::from) {
        Some(node) if node >= nodes => {
            Err(format!("--node-rank {node} is too large: with --nnodes {nodes} it is below {nodes}"))
        }
        Some(node) => Ok(node),
        None if nodes == 1 => Ok(0),
        None => Err(format!("--nnodes {nodes} needs --node-rank: which of them this machine is, from 0")),
    }?;
    if nodes > 1 && flags.rdzv.is_none() {
        return Err(format!(
            "--nnodes {nodes} needs --rdzv HOST:PORT: where the machines meet, the same on all of them"
        ));
    }
    Ok(Role::Launcher { ranks, node, nodes, meet: flags.rdzv.clone() })
}

/// A machine of Kubernetes; options win.
fn by_environment(flags: &LaunchArguments, number: Option<usize>, node: &Node) -> Result<Role, String> {
    let nodes = flags.nnodes.map_or(node.count, usize::from);
    let Some(ranks) = number.or(node.ranks) else {
        return Err("the environment does not say how many ranks to start on this machine: set PET_NPROC_PER_NODE to a number, or --ranks N".into());
    };
    let all = LaunchArguments {
        nnodes: u16::try_from(nodes).ok(),
        node_rank: flags.node_rank.or(u16::try_from(node.rank).ok()),
        rdzv: flags.rdzv.clone().or(node.meet.clone()),
        ..flags.clone()
    };
    by_flags(&all, ranks, nodes)
}

fn name_of(launcher: Launcher) -> &'static str {
    match launcher {
        Launcher::Own => "ddpm-dist",
        Launcher::Torchrun => "torchrun",
        Launcher::OpenMpi => "Open MPI's mpirun",
        Launcher::Slurm => "srun",
        Launcher::Pmi => "MPICH's mpirun",
        Launcher::Generic => "whoever set RANK and WORLD_SIZE",
    }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
mod tests;
