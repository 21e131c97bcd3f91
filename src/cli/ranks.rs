//! This process among the ranks of a run, as every subcommand that computes sees it.

use super::exit::{Code, Failure, OrFail};
use super::guard::Guard;
use super::{Common, Stop};
use crate::cluster::watchdog::Watchdog;
use crate::cluster::{Cores, Preemption};
use crate::collective::host::{Host, Meeting, MeetingError};
use crate::collective::nccl::Nccl;
use crate::collective::{Activity, Collective, CollectiveError, Solo};
use crate::device::cuda::{nccl, versions};
use crate::device::{Device, DeviceKind};
use crate::rendezvous::store::{Client, ServeError, Server, StoreError};
use crate::rendezvous::{Detected, Environment, Launcher, World, detect};
use crate::report::{Console, Verbosity};
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How often a rank says what it is doing.
const PUBLISHED: Duration = Duration::from_millis(500);
/// How long the other ranks may need the store after rank 0 has finished.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long it may take to find out what the others were doing.
const EXPLAINED: Duration = Duration::from_secs(6);

/// This rank, and its connection to the others.
pub(super) struct Ranks {
    link: Link,
    world: Option<World>,
    /// The address of this machine that the others are to use, if one was chosen.
    interface: Option<IpAddr>,
    patience: Duration,
    /// This rank's part of the cores that it may use.
    part: f64,
    together: Option<Together>,
}

/// What adds up.
enum Link {
    Alone(Solo),
    Several(Box<Nccl>),
}

/// What there is where there are several ranks.
struct Together {
    activity: Arc<Activity>,
    watchdog: Watchdog,
    _preemption: Preemption,
    /// Dropped last: the other ranks use it as long as they run.
    _store: Option<Serving>,
}

/// The store, served by this rank. The others read in it to the end (whether the last checkpoint is committed, say), so that it stays until
/// they have left or are lost, but not for ones that hang.
struct Serving(Server);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.until_all_have_left(FAREWELL);
    }
}

impl Ranks {
    /// Meets the other ranks, if a launcher has started several. A request to stop meanwhile ends the process, with `stopped` or, if there
    /// is none, as the signal would have.
    pub fn join(common: &Common, stop: &Stop, stopped: Option<Code>) -> Result<Ranks, Failure> {
        Ranks::join_or(common, stop, stopped, |_| {})
    }

    /// As [`Ranks::join`]; where the process is asked to stop, rank 0 (of so many) does something `first`.
    pub fn join_or(
        common: &Common,
        stop: &Stop,
        stopped: Option<Code>,
        first: impl FnOnce(usize) + Send + 'static,
    ) -> Result<Ranks, Failure> {
        let patience = common.launch.patience();
        let world = match detect(&Environment::of_this_process()).or_fail(Code::Usage)? {
            Detected::Rank(world) => Some(world),
            Detected::Alone | Detected::Node(_) => None,
        };
        let Some(world) = world.as_ref().filter(|world| world.size > 1) else {
            return Ok(Ranks { link: Link::Alone(Solo), world, interface: None, patience, part: 1.0, together: None });
        };
        let interface = common.launch.interface()?;
        let (rank, size) = (world.rank, world.size);
        let lead = move || {
            if rank == 0 {
                first(size)
            }
        };
        let _guard = Guard::new(stop, stopped, lead).or_fail(Code::Failed)?;
        let server = serve(world, interface, &common.console())?;
        let connect = || world.connect(interface, patience).or_fail(Code::Rendezvous);
        let preemption = Preemption::watch(connect()?, stop.request.clone()).or_fail(Code::Failed)?;
        let (rank, size, one_machine) = (world.rank, world.size, world.is_one_machine());
        let meeting = Meeting { rank, size, one_machine, store: connect()?, patience };
        let mut host = Host::join(meeting, patience).map_err(|error| match &error {
            // Whoever went is the cause, and not this rank.
            MeetingError::Parted(_) => Failure::new(Code::PeerLost, error),
            _ => Failure::new(Code::Rendezvous, error),
        })?;
        if let (Some(notice), 0) = (host.notice(), world.rank) {
            common.console().say(notice);
        }
        let activity = host.activity();
        let watchdog = Watchdog::start(connect()?, world.rank, world.size, Arc::clone(&activity), PUBLISHED);
        let watchdog = watchdog.or_fail(Code::Failed)?;
        let part = part_of_cores(&mut host)?;
        let together = Together { activity, watchdog, _preemption: preemption, _store: server.map(Serving) };
        Ok(Ranks {
            link: Link::Several(Box::new(Nccl::over(host, patience))),
            world: Some(world.clone()),
            interface,
            patience,
            part,
            together: Some(together),
        })
    }

    /// Where this rank notes what it is doing, for the others.
    pub fn activity(&self) -> Option<Arc<Activity>> {
        self.together.as_ref().map(|together| Arc::clone(&together.activity))
    }

    /// A failure to be reported; where it was caused by ranks that did not answer in time, with what they were doing, and once where all have
    /// been told of one.
    pub fn explained(&self, code: Code, error: &impl Display, cause: Option<&CollectiveError>) -> Failure {
        match (&self.together, cause) {
            (Some(together), Some(cause @ CollectiveError::TimedOut { .. })) => {
                Failure::new(code, together.watchdog.explain(cause, EXPLAINED))
            }
            (_, Some(CollectiveError::DeviceOf { .. })) => self.said_once(Failure::new(code, error)),
            _ => Failure::new(code, error),
        }
    }

    /// A failure that all ranks have: rank 0 speaks for them.
    pub fn said_once(&self, failure: Failure) -> Failure {
        if self.is_rank_zero() { failure } else { failure.said_elsewhere() }
    }

    /// What this rank computes on.
    pub fn device(&mut self, common: &Common) -> Result<Device, Failure> {
        let local_rank = self.world.as_ref().map_or(0, |world| world.local_rank);
        let device = common.device(local_rank, self.part)?;
        if self.number() > 1 {
            self.same_everywhere(match device.kind() {
                DeviceKind::Cpu => "CPU cores (see --device)",
                DeviceKind::Cuda => "a GPU (see --device)",
            })?;
        }
        Ok(device)
    }

    /// What this rank trains on. GPUs add up among themselves, where that can be.
    pub fn training_device(&mut self, common: &Common) -> Result<Device, Failure> {
        let mut device = self.device(common)?;
        self.join_gpus(&mut device, &self.joint(common)).map_err(Failure::leave_soon)?;
        Ok(device)
    }

    fn join_gpus(&mut self, device: &mut Device, console: &Console) -> Result<(), Failure> {
        let Link::Several(ranks) = &mut self.link else { return Ok(()) };
        let untested = nccl::version().ok().and_then(|version| versions::NCCL.warning(&version));
        untested.into_iter().for_each(|text| console.alarm(text));
        let joined = ranks.join_gpus(device);
        if let Some(notice) = ranks.notice() {
            console.alarm(notice);
        }
        joined.map_err(|error| {
            let code = if matches!(error, CollectiveError::Device(_) | CollectiveError::Stuck(_)) {
                Code::Device
            } else {
                Code::PeerLost
            };
            self.explained(code, &error, Some(&error))
        })
    }

    pub fn collective(&mut self) -> &mut dyn Collective {
        match &mut self.link {
            Link::Alone(solo) => solo,
            Link::Several(ranks) => &mut **ranks,
        }
    }

    /// What opens a connection to the store of the ranks, where there are several.
    pub fn connect(&self) -> Option<impl Fn() -> Result<Client, StoreError> + use<>> {
        let world = self.world.clone().filter(|world| world.size > 1)?;
        let (interface, patience) = (self.interface, self.patience);
        Some(move || world.connect(interface, patience))
    }

    /// When the launcher of these ranks has started them first, if it is one that starts them again and has a store that outlives them.
    pub fn first_started(&self, now: Duration) -> Result<Duration, Failure> {
        match &self.world {
            Some(world) if world.size > 1 && world.launcher == Launcher::Torchrun => {
                world.first_started(now, self.interface, self.patience).or_fail(Code::Rendezvous)
            }
            _ => Ok(now),
        }
    }

    /// Number of ranks.
    pub fn number(&self) -> usize {
        match &self.link {
            Link::Alone(solo) => solo.world_size(),
            Link::Several(ranks) => ranks.world_size(),
        }
    }

    /// Refuses ranks that do not say the same of what they are about to do.
    pub fn same_everywhere(&mut self, mine: &str) -> Result<(), Failure> {
        let all = self.collective().all_gather(mine.as_bytes().to_vec()).or_fail(Code::PeerLost)?;
        let Some(rank) = all.iter().position(|theirs| *theirs != all[0]) else { return Ok(()) };
        let [zero, other] = [&all[0], &all[rank]].map(|said| String::from_utf8_lossy(said).into_owned());
        let message = format!("the ranks do not belong together: rank 0 has {zero}, rank {rank} {other}");
        Err(self.said_once(Failure::new(Code::Usage, message)))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        match &self.link {
            Link::Alone(solo) => solo.rank(),
            Link::Several(ranks) => ranks.rank(),
        }
    }

    /// Returns when all ranks have come here, or one is gone.
    pub fn leave_together(&mut self) {
        // Whoever is gone has done its part.
        let _ = self.collective().all_gather(Vec::new());
    }

    pub fn is_rank_zero(&self) -> bool {
        self.rank() == 0
    }

    /// Whether this is the first rank of its machine.
    pub fn is_first_here(&self) -> bool {
        self.world.as_ref().is_none_or(|world| world.local_rank == 0)
    }

    /// Where is said what all ranks would say alike.
    pub fn joint(&self, common: &Common) -> Console {
        if self.is_rank_zero() { common.console() } else { Console::new(Verbosity::Silent) }
    }

    /// Where this rank speaks: rank 0 for all, the others when something is wrong.
    pub fn console(&self, common: &Common) -> Console {
        if self.is_rank_zero() { common.console() } else { Console::new(Verbosity::Quiet) }
    }
}

/// Finds out with whom this rank shares its cores.
fn part_of_cores(host: &mut Host) -> Result<f64, Failure> {
    let mine = Cores::of_this_process().or_fail(Code::Failed)?;
    let all = host.all_gather(serde_json::to_vec(&mine).or_fail(Code::Failed)?).or_fail(Code::PeerLost)?;
    let cores = all.iter().enumerate().map(|(rank, text)| {
        serde_json::from_slice(text).map_err(|error| {
            let message =
                format!("rank {rank} does not say what cores it has ({error}): are all ranks of one version?");
            Failure::new(Code::Usage, message)
        })
    });
    Ok(mine.part(&cores.collect::<Result<Vec<Cores>, _>>()?))
}

/// Serves the store, where that is this rank's part, and says on which network.
fn serve(world: &World, interface: Option<IpAddr>, console: &Console) -> Result<Option<Server>, Failure> {
    let server = world.serve_store(interface).map_err(|error| {
        let message = match &error {
            ServeError::OtherNetwork { chosen, .. } => {
                format!("the ranks are to meet at {error}: set MASTER_ADDR to {chosen}, for all ranks alike")
            }
            ServeError::Listen { .. } => {
                format!("{error}; the ranks are to meet there: set MASTER_PORT to a free port, for all ranks alike")
            }
        };
        let code = if matches!(error, ServeError::OtherNetwork { .. }) { Code::Usage } else { Code::Rendezvous };
        Failure::new(code, message)
    })?;
    if let Some(server) = server.as_ref().filter(|_| !world.is_one_machine()) {
        let network = interface.map_or("all networks of this machine".to_string(), |address| address.to_string());
        console.say(format!("the ranks meet on port {}, open on {network}", server.address().port()));
    }
    Ok(server)
}
