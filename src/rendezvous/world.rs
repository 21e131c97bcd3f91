//! From an environment to a place in the world.

use super::Environment;
use super::environment::PMI_RANK;
use super::interface::is_loopback;
use super::slurm::{first_host, tasks_of_node};
use thiserror::Error;

/// Most ranks of a run, and most on one machine: more is a mistake.
pub const MAX_RANKS: usize = 4096;

/// Who started this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `ddpm-dist --ranks N`.
    Own,
    /// PyTorch's torchrun.
    Torchrun,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// MPICH's `mpirun`, or whatever else speaks PMI.
    Pmi,
    /// Something that sets `RANK` and `WORLD_SIZE`.
    Generic,
}

/// Who answers at the store's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreHost {
    /// The launcher, before any rank starts.
    Launcher,
    /// Rank 0.
    RankZero,
}

/// Where the ranks meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreAddress {
    /// Name or address of the host.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Who listens there.
    pub served_by: StoreHost,
}

/// A process's place among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Who started it.
    pub launcher: Launcher,
    /// Its number, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Its number among the ranks of its machine, from 0.
    pub local_rank: usize,
    /// Number of ranks on its machine.
    pub local_size: usize,
    /// Where the ranks meet.
    pub store: StoreAddress,
    /// What tells this run from others, if its launcher says so: another run's ranks may come to its store.
    pub run: String,
    /// How often the world was started before: a store that outlives a world still holds the keys of the earlier ones.
    pub attempt: u32,
}

/// A machine on which this process is to start the ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The machine's number, from 0.
    pub rank: usize,
    /// Number of machines.
    pub count: usize,
    /// Ranks to start here, if the environment says.
    pub ranks: Option<usize>,
    /// Where the machines meet: host and port.
    pub meet: Option<(String, u16)>,
}

/// What an environment says of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detected {
    /// No launcher started it.
    Alone,
    /// It is a rank.
    Rank(World),
    /// It stands for a machine (a pod of Kubernetes) and is to start ranks.
    Node(Node),
}

/// An environment that contradicts itself or leaves something out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WorldError {
    /// A variable that must be there.
    #[error("{because}, but {name} is not set: set it, or start with `ddpm-dist --ranks`")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What needs it.
        because: &'static str,
    },
    /// A variable that must be a number.
    #[error("{name} is `{value}`, expected a whole number that fits")]
    NotANumber {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
    },
    /// A variable in a notation that is not known.
    #[error("{name} is `{value}`, which does not say {what}")]
    Unreadable {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it was to say.
        what: &'static str,
    },
    /// A number that must be below another.
    #[error("{what} is {found}, expected less than {limit}: the launcher's environment contradicts itself")]
    OutOfRange {
        /// What the number is.
        what: &'static str,
        /// The number.
        found: usize,
        /// What it must be below.
        limit: usize,
    },
    /// A number that nobody means.
    #[error("{what} is {found}, expected 1 to {most}")]
    OutOfBounds {
        /// What the number is.
        what: &'static str,
        /// The number.
        found: usize,
        /// The largest that is allowed.
        most: usize,
    },
    /// Several machines and no address to meet at.
    #[error(
        "{size} ranks on several machines do not know where to meet: set MASTER_ADDR to the host of rank 0 (and MASTER_PORT to a free port)"
    )]
    NowhereToMeet {
        /// Number of ranks.
        size: usize,
    },
}

/// Variables by which our own launcher is known.
pub const OWN_RUN_ID: &str = "DDPM_DIST_RUN_ID";
/// How often it started the world before.
pub const OWN_ATTEMPT: &str = "DDPM_DIST_ATTEMPT";
/// When it began, in seconds since 1970.
pub const OWN_STARTED: &str = "DDPM_DIST_STARTED";

/// What `environment` says of this process. The first launcher that matches counts, in this order:
///
/// 1. our own, which may itself run inside any other;
/// 2. torchrun;
/// 3. Open MPI, whose processes inside an sbatch script all show `SLURM_PROCID=0`;
/// 4. a Slurm step. A batch script without `srun` is no step; nor is MPICH inside one, which starts its helper as a step of one task for
///    each machine: there `PMI_SIZE` differs from the number of tasks, while `srun --mpi=pmi2` sets both alike;
/// 5. PMI;
/// 6. Kubernetes, where the process stands for a machine;
/// 7. `RANK` and `WORLD_SIZE`.
///
/// # Errors
/// A launcher that is recognised and leaves out or contradicts what is needed.
pub fn detect(environment: &Environment) -> Result<Detected, WorldError> {
    let e = environment;
    let world = if e.has(OWN_RUN_ID) {
        ranked(e, Launcher::Own, "ddpm-dist's launcher started this process")?
    } else if e.has("TORCHELASTIC_RUN_ID") {
        ranked(e, Launcher::Torchrun, "torchrun started this process")?
    } else if e.has("OMPI_COMM_WORLD_RANK") {
        open_mpi(e)?
    } else if is_slurm_step(e)? {
        slurm(e)?
    } else if e.has(PMI_RANK) && e.has("PMI_SIZE") {
        pmi(e)?
    } else if e.has("PET_NNODES") || e.has("JOB_COMPLETION_INDEX") {
        return node(e).map(Detected::Node);
    } else if e.has("RANK") && e.has("WORLD_SIZE") {
        ranked(e, Launcher::Generic, "RANK and WORLD_SIZE are set")?
    } else {
        return Ok(Detected::Alone);
    };
    world.check().map(Detected::Rank)
}

/// The variables of torchrun, which others use too.
fn ranked(e: &Environment, launcher: Launcher, because: &'static str) -> Result<World, WorldError> {
    let (rank, size) = (e.need_number("RANK", because)?, e.need_number("WORLD_SIZE", because)?);
    let strict = launcher != Launcher::Generic;
    let local = |name| match e.number(name)? {
        None if strict => Err(WorldError::Missing { name, because }),
        number => Ok(number),
    };
    let (local_rank, local_size) = (local("LOCAL_RANK")?, local("LOCAL_WORLD_SIZE")?);
    let local_size = match local_size {
        Some(local_size) => local_size,
        None if size > 1 && e.get("MASTER_ADDR").is_some_and(|host| !is_loopback(host)) => {
            let because = "RANK and WORLD_SIZE are set, and MASTER_ADDR may be another machine";
            return Err(WorldError::Missing { name: "LOCAL_WORLD_SIZE", because });
        }
        // They meet on this machine, so that all are here.
        None => size,
    };
    let local_rank = match local_rank {
        Some(local_rank) => local_rank,
        None if local_size == size => rank,
        None => {
            let because = "RANK and WORLD_SIZE are set, and LOCAL_WORLD_SIZE says that there are several machines";
            return Err(WorldError::Missing { name: "LOCAL_RANK", because });
        }
    };
    let store = match (size, strict) {
        (1, false) => meeting_place(e, None, size, local_size)?,
        _ => StoreAddress {
            host: e.need("MASTER_ADDR", because)?.to_string(),
            port: e.need_number("MASTER_PORT", because)?,
            served_by: StoreHost::RankZero,
        },
    };
    let by_launcher = match launcher {
        Launcher::Own => true,
        Launcher::Torchrun => e.get("TORCHELASTIC_USE_AGENT_STORE") == Some("True"),
        _ => false,
    };
    let served_by = if by_launcher { StoreHost::Launcher } else { StoreHost::RankZero };
    let attempt = match launcher {
        Launcher::Own => e.number(OWN_ATTEMPT)?,
        Launcher::Torchrun => e.number("TORCHELASTIC_RESTART_COUNT")?,
        _ => None,
    };
    let run = match launcher {
        Launcher::Own => e.get(OWN_RUN_ID),
        Launcher::Torchrun => e.get("TORCHELASTIC_RUN_ID"),
        _ => None,
    };
    let (store, run) = (StoreAddress { served_by, ..store }, run.unwrap_or_default().to_string());
    Ok(World { launcher, rank, size, local_rank, local_size, store, run, attempt: attempt.unwrap_or(0) })
}

fn open_mpi(e: &Environment) -> Result<World, WorldError> {
    let because = "Open MPI started this process";
    let rank = e.need_number("OMPI_COMM_WORLD_RANK", because)?;
    let size = e.need_number("OMPI_COMM_WORLD_SIZE", because)?;
    let local_rank = e.need_number("OMPI_COMM_WORLD_LOCAL_RANK", because)?;
    let local_size = e.need_number("OMPI_COMM_WORLD_LOCAL_SIZE", because)?;
    let job = e.get("PMIX_NAMESPACE").or_else(|| e.get("OMPI_MCA_ess_base_jobid"));
    let store = meeting_place(e, job, size, local_size)?;
    let run = job.unwrap_or_default().to_string();
    Ok(World { launcher: Launcher::OpenMpi, rank, size, local_rank, local_size, store, run, attempt: 0 })
}

fn is_slurm_step(e: &Environment) -> Result<bool, WorldError> {
    if !(e.has("SLURM_PROCID") && e.has("SLURM_STEP_ID")) {
        return Ok(false);
    }
    let tasks: Option<usize> = e.number("SLURM_STEP_NUM_TASKS")?;
    let pmi: Option<usize> = e.number("PMI_SIZE")?;
    Ok(pmi.is_none() || pmi == tasks)
}

fn slurm(e: &Environment) -> Result<World, WorldError> {
    let because = "srun started this process";
    let rank = e.need_number("SLURM_PROCID", because)?;
    let size = e.need_number("SLURM_STEP_NUM_TASKS", because)?;
    let local_rank = e.need_number("SLURM_LOCALID", because)?;
    let node = e.number("SLURM_NODEID")?.unwrap_or(0);
    let tasks = "SLURM_STEP_TASKS_PER_NODE";
    let list = e.need(tasks, because)?;
    let local_size = tasks_of_node(list, node).ok_or_else(|| WorldError::Unreadable {
        name: tasks,
        value: list.to_string(),
        what: "how many tasks this node has",
    })?;
    let nodes = "SLURM_STEP_NODELIST";
    let list = e.need(nodes, because)?;
    let first = first_host(list).ok_or_else(|| WorldError::Unreadable {
        name: nodes,
        value: list.to_string(),
        what: "which node is the first",
    })?;
    let step = slurm_step(e);
    let store = StoreAddress {
        host: e.get("MASTER_ADDR").map_or(first, str::to_string),
        port: e.number("MASTER_PORT")?.unwrap_or_else(|| port_of_job(&step)),
        served_by: StoreHost::RankZero,
    };
    let attempt = e.number("SLURM_RESTART_COUNT")?.unwrap_or(0);
    Ok(World { launcher: Launcher::Slurm, rank, size, local_rank, local_size, store, run: step, attempt })
}

fn slurm_step(e: &Environment) -> String {
    format!("{}.{}", e.get("SLURM_JOB_ID").unwrap_or_default(), e.get("SLURM_STEP_ID").unwrap_or_default())
}

fn pmi(e: &Environment) -> Result<World, WorldError> {
    let because = "PMI variables are set, as MPICH does";
    let (rank, size) = (e.need_number(PMI_RANK, because)?, e.need_number("PMI_SIZE", because)?);
    let local_rank = e.need_number("MPI_LOCALRANKID", because)?;
    let local_size = e.need_number("MPI_LOCALNRANKS", because)?;
    let job = match (e.get("PMI_JOBID"), e.launcher()) {
        (Some(job), _) => Some(job.to_string()),
        // MPICH names its runs only where Slurm does, but its ranks on one machine know who started them all.
        (None, Some(launcher)) if local_size == size => Some(format!("process {launcher}")),
        // There its helpers are one step.
        (None, _) => e.has("SLURM_JOB_ID").then(|| slurm_step(e)),
    };
    let store = meeting_place(e, job.as_deref(), size, local_size)?;
    let run = job.unwrap_or_default();
    Ok(World { launcher: Launcher::Pmi, rank, size, local_rank, local_size, store, run, attempt: 0 })
}

/// A pod of Kubeflow's trainer (`PET_…`), or of a JobSet or Indexed Job that sets `PET_NNODES` itself.
fn node(e: &Environment) -> Result<Node, WorldError> {
    let because = "Kubernetes started this process as one of several";
    let rank = match e.number("PET_NODE_RANK")? {
        Some(rank) => rank,
        None => e.need_number("JOB_COMPLETION_INDEX", because)?,
    };
    let count = e.need_number("PET_NNODES", because)?;
    bounded("PET_NNODES", count)?;
    below("the node's rank", rank, count)?;
    let meet = match e.get("PET_MASTER_ADDR") {
        Some(host) => Some((host.to_string(), e.need_number("PET_MASTER_PORT", because)?)),
        None if count > 1 => return Err(WorldError::Missing { name: "PET_MASTER_ADDR", because }),
        None => None,
    };
    // `auto` and `gpu` leave the number to what the machine has.
    let ranks = match e.get("PET_NPROC_PER_NODE") {
        Some("auto" | "gpu" | "cpu") => None,
        _ => e.number("PET_NPROC_PER_NODE")?,
    };
    ranks.map_or(Ok(()), |ranks| bounded("PET_NPROC_PER_NODE", ranks))?;
    Ok(Node { rank, count, ranks, meet })
}

/// `MASTER_ADDR`, or this machine if all ranks are on it; `MASTER_PORT`, or a port that the ranks of a job agree on by its name, if it has
/// one: else two runs would meet.
fn meeting_place(
    e: &Environment,
    job: Option<&str>,
    size: usize,
    local_size: usize,
) -> Result<StoreAddress, WorldError> {
    let because = "this launcher does not tell one run from another";
    let host = match e.get("MASTER_ADDR") {
        Some(host) => host.to_string(),
        None if local_size == size => "127.0.0.1".to_string(),
        None => return Err(WorldError::NowhereToMeet { size }),
    };
    let port = match (e.number("MASTER_PORT")?, job) {
        (Some(port), _) => port,
        (None, Some(job)) => port_of_job(job),
        (None, None) if size == 1 => 0,
        (None, None) => return Err(WorldError::Missing { name: "MASTER_PORT", because }),
    };
    Ok(StoreAddress { host, port, served_by: StoreHost::RankZero })
}

/// A port below those that systems give out by themselves (32768 and up), by the FNV-1a hash of a job's name.
fn port_of_job(job: &str) -> u16 {
    const FIRST: u16 = 15_000;
    const PORTS: u64 = 15_000;
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    FIRST + (job.bytes().fold(0xcbf2_9ce4_8422_2325, step) % PORTS) as u16
}

fn below(what: &'static str, found: usize, limit: usize) -> Result<(), WorldError> {
    if found < limit { Ok(()) } else { Err(WorldError::OutOfRange { what, found, limit }) }
}

fn bounded(what: &'static str, found: usize) -> Result<(), WorldError> {
    match found {
        1..=MAX_RANKS => Ok(()),
        _ => Err(WorldError::OutOfBounds { what, found, most: MAX_RANKS }),
    }
}

impl World {
    fn check(self) -> Result<World, WorldError> {
        bounded("the number of ranks", self.size)?;
        below("the rank", self.rank, self.size)?;
        below("the local rank", self.local_rank, self.local_size)?;
        below("the number of local ranks", self.local_size, self.size.saturating_add(1))?;
        Ok(self)
    }
}
