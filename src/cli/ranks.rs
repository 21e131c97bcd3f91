//! This process among the ranks of a run, as every subcommand that computes sees it.

use super::exit::{Code, Failure, OrFail};
use super::{Common, Stop};
use crate::cluster::Preemption;
use crate::cluster::watchdog::Watchdog;
use crate::collective::host::{Host, Meeting};
use crate::collective::{Activity, Collective, CollectiveError, Solo};
use crate::rendezvous::store::{Client, Server, StoreError};
use crate::rendezvous::{Detected, Environment, StoreAddress, StoreHost, World, detect};
use crate::report::Console;
use crate::tape::RunError;
use crate::train::TrainError;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a rank that waits for others looks whether it is asked to stop, and how long the others may take to hear of it.
const LOOKS: Duration = Duration::from_millis(50);
const TOLD: Duration = Duration::from_millis(500);
/// How often a rank says what it is doing.
const PUBLISHED: Duration = Duration::from_millis(500);
/// How long it may take to find out what the others were doing.
const EXPLAINED: Duration = Duration::from_secs(6);

/// This rank, and its connection to the others.
pub(super) struct Ranks {
    collective: Box<dyn Collective>,
    world: Option<World>,
    patience: Duration,
    together: Option<Together>,
}

/// What there is where there are several ranks.
struct Together {
    activity: Arc<Activity>,
    watchdog: Watchdog,
    _preemption: Preemption,
    /// Dropped last: the other ranks use it as long as they run.
    _store: Option<Server>,
}

impl Ranks {
    /// Meets the other ranks, if a launcher has started several. A request to stop meanwhile ends the process, with `stopped` or, if there
    /// is none, as the signal would have.
    pub fn join(common: &Common, stop: &Stop, stopped: Option<Code>) -> Result<Ranks, Failure> {
        let patience = common.launch.patience();
        let world = match detect(&Environment::of_this_process()).or_fail(Code::Usage)? {
            Detected::Rank(world) => Some(world),
            Detected::Alone | Detected::Node(_) => None,
        };
        let Some(world) = world.as_ref().filter(|world| world.size > 1) else {
            return Ok(Ranks { collective: Box::new(Solo), world, patience, together: None });
        };
        let _guard = Guard::new(stop, stopped).or_fail(Code::Failed)?;
        let one_machine = world.local_size == world.size;
        let server = match world.store.served_by == StoreHost::RankZero && world.rank == 0 {
            true => Some(serve(&world.store, one_machine, &common.console())?),
            false => None,
        };
        let connect = || connect(world, patience).or_fail(Code::Rendezvous);
        let preemption = Preemption::watch(connect()?, stop.request.clone()).or_fail(Code::Failed)?;
        let meeting = Meeting { rank: world.rank, size: world.size, one_machine, store: connect()?, patience };
        let host = Host::join(meeting, patience).or_fail(Code::Rendezvous)?;
        if let (Some(notice), 0) = (host.notice(), world.rank) {
            common.console().say(notice);
        }
        let activity = host.activity();
        let watchdog = Watchdog::start(connect()?, world.rank, world.size, Arc::clone(&activity), PUBLISHED);
        let watchdog = watchdog.or_fail(Code::Failed)?;
        let together = Together { activity, watchdog, _preemption: preemption, _store: server };
        Ok(Ranks { collective: Box::new(host), world: Some(world.clone()), patience, together: Some(together) })
    }

    /// Where this rank notes what it is doing, for the others.
    pub fn activity(&self) -> Option<Arc<Activity>> {
        self.together.as_ref().map(|together| Arc::clone(&together.activity))
    }

    /// A failure to be reported; where ranks did not answer in time, with what they were doing.
    pub fn explained(&self, code: Code, error: &TrainError) -> Failure {
        match (&self.together, error) {
            (Some(together), TrainError::Run(RunError::Collective(cause @ CollectiveError::TimedOut { .. }))) => {
                Failure::new(code, together.watchdog.explain(cause, EXPLAINED))
            }
            _ => Failure::new(code, error),
        }
    }

    pub fn collective(&mut self) -> &mut dyn Collective {
        &mut *self.collective
    }

    /// What opens a connection to the store of the ranks, where there are several.
    pub fn connect(&self) -> Option<impl Fn() -> Result<Client, StoreError> + use<>> {
        let (world, patience) = (self.world.clone().filter(|world| world.size > 1)?, self.patience);
        Some(move || connect(&world, patience))
    }

    /// Number of ranks.
    pub fn number(&self) -> usize {
        self.collective.world_size()
    }

    pub fn is_rank_zero(&self) -> bool {
        self.collective.rank() == 0
    }

    /// Number of ranks on this machine.
    pub fn here(&self) -> usize {
        self.world.as_ref().map_or(1, |world| world.local_size)
    }

    /// Whether this is the first rank of its machine.
    pub fn is_first_here(&self) -> bool {
        self.world.as_ref().is_none_or(|world| world.local_rank == 0)
    }

    /// Where this rank speaks: rank 0 for all, the others when something is wrong.
    pub fn console(&self, common: &Common) -> Console {
        if self.is_rank_zero() { common.console() } else { Console::new(crate::report::Verbosity::Quiet) }
    }
}

/// Ends the process when it is asked to stop, until this is dropped: who waits for other ranks has nothing to save and sees no flag.
struct Guard {
    over: Arc<AtomicBool>,
}

impl Guard {
    fn new(stop: &Stop, stopped: Option<Code>) -> std::io::Result<Guard> {
        let over = Arc::new(AtomicBool::new(false));
        let (ended, stop) = (Arc::clone(&over), stop.clone());
        std::thread::Builder::new().name("guard".into()).spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                if stop.is_set() {
                    // So that the others hear of it, too.
                    std::thread::sleep(TOLD);
                    if !ended.load(Ordering::SeqCst) {
                        let _ = writeln!(std::io::stderr(), "ddpm-dist: stopped before all ranks had come");
                        std::process::exit(stopped.unwrap_or(stop.code()) as i32);
                    }
                }
                std::thread::sleep(LOOKS);
            }
        })?;
        Ok(Guard { over })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// Keys are those of this start of the run: a store may outlive it.
fn connect(world: &World, patience: Duration) -> Result<Client, StoreError> {
    Client::connect(&world.store, &format!("ddpm-dist/{}/", world.attempt), patience)
}

/// Serves the store at the port that all ranks agree on.
fn serve(store: &StoreAddress, one_machine: bool, console: &Console) -> Result<Server, Failure> {
    let here = if one_machine { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
    let port = store.port;
    let server = Server::listen(SocketAddr::new(here.into(), port)).map_err(|error| {
        let message = format!(
            "cannot listen on port {port}, where the ranks are to meet: {error}; set MASTER_PORT to a free port, for all ranks alike"
        );
        Failure::new(Code::Rendezvous, message)
    })?;
    if !one_machine {
        console.say(format!("the ranks meet on port {port}, open on all networks of this machine"));
    }
    Ok(server)
}
