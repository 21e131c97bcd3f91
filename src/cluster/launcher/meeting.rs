//! How the launchers of several nodes agree: node 0 decides, and the others read what in its store.
//!
//! | key under `launcher/` | who sets it | what |
//! |---|---|---|
//! | `node/K` | node K | that it is there, and with how many places; empty once it has left before the run began |
//! | `order/N` | node 0 | the N-th order: start attempt N, or stop |
//! | `failing/N` | any | a rank of attempt N failed: the others are to end |
//! | `leaving` | any | the signal by which someone wants the run to leave |
//! | `ended/N/K` | node K | how its ranks of attempt N ended |
//! | `beat/K` | node K | a number that grows while its launcher lives |
//! | `bye/K` | node K | it has read the last order |

use super::child::Attempt;
use super::ends::RankEnd;
use super::inbox::Inbox;
use super::place::{connect, host_for_all, resolve, serve};
use super::voice::Voice;
use super::watch::Watch;
use super::{Job, LaunchError};
use crate::machine::host_name;
use crate::rendezvous::store::{Client, Server, StoreError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::{Duration, Instant};

pub(super) const PREFIX: &str = "launcher/";
/// Pause between two looks at the store.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// How long the last order may take to be read.
const GOODBYES: Duration = Duration::from_secs(5);
/// How long a value may take that is known to be there.
const ANSWER: Duration = Duration::from_secs(10);

/// What node 0 has decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Order {
    /// Start the ranks; and, after the first time, why.
    Start { attempt: Attempt, because: Option<String> },
    /// The run is over, with this exit code.
    Stop { code: u8, message: Option<String> },
}

/// What a launcher says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct NodeInfo {
    pub host: String,
    /// Places for ranks.
    pub ranks: usize,
    pub nodes: usize,
    pub version: String,
    /// What the meeting place's name means there.
    meets_at: Option<IpAddr>,
    /// No two launchers are the same.
    id: String,
}

/// The launchers of a run.
pub(super) struct Meeting<'a> {
    pub(super) job: &'a Job,
    /// On node 0.
    server: Option<Server>,
    /// Where there are several nodes.
    client: Option<Client>,
    _watch: Option<Watch>,
    /// Known to node 0; the others know of themselves.
    pub nodes: Vec<NodeInfo>,
    told_failing: Option<u32>,
    told_leaving: bool,
}

impl<'a> Meeting<'a> {
    /// Serves the store on node 0, and brings all launchers together.
    pub(super) fn open(job: &'a Job, voice: &Voice, inbox: &mut Inbox) -> Result<Meeting<'a>, LaunchError> {
        let is_lead = job.node == 0;
        let server = is_lead.then(|| serve(job)).transpose()?;
        let me = NodeInfo {
            host: host_name(),
            ranks: job.ranks,
            nodes: job.nodes,
            version: env!("CARGO_PKG_VERSION").to_string(),
            meets_at: job.meet.as_ref().and_then(|(host, port)| resolve(host, *port)),
            id: crate::files::unique_id(),
        };
        let mut meeting = Meeting {
            job,
            server,
            client: None,
            _watch: None,
            nodes: vec![me.clone()],
            told_failing: None,
            told_leaving: false,
        };
        if job.nodes == 1 {
            return Ok(meeting);
        }
        let port = meeting.port();
        if is_lead {
            voice.say(&format!(
                "node 0 ({}) waits for {} other{} on port {port} of {}; whoever can reach it can disturb the run",
                me.host,
                job.nodes - 1,
                if job.nodes == 2 { "" } else { "s" },
                job.interface.map_or("all its interfaces".to_string(), |address| address.to_string()),
            ));
        }
        let host = match (is_lead, job.interface) {
            (true, Some(address)) => address.to_string(),
            (true, None) => "127.0.0.1".to_string(),
            (false, _) => meeting.host().to_string(),
        };
        meeting.client = Some(connect(&host, port, job.patience, inbox)?);
        meeting.announce(&me, inbox)?;
        if is_lead {
            let joined = meeting.all_nodes(inbox);
            if let Err(error) = &joined {
                // Those who did join hear why there is no run.
                let (code, message) = ((job.codes.of_error)(error), Some(error.to_string()));
                meeting.stop(0, &Order::Stop { code, message }, inbox);
            }
            meeting.nodes = joined?;
        }
        let mut hosts: Vec<String> = meeting.nodes.iter().map(|node| node.host.clone()).collect();
        if !is_lead {
            hosts = vec![meeting.host().to_string()];
        }
        let client = connect(&host, port, job.patience, inbox)?;
        meeting._watch = Some(
            Watch::start(client, job, hosts, inbox.doorbell())
                .map_err(|source| LaunchError::Listen { port, source })?,
        );
        Ok(meeting)
    }

    /// The port of the store.
    pub(super) fn port(&self) -> u16 {
        match (&self.server, &self.job.meet) {
            (Some(server), _) => server.address().port(),
            (None, Some((_, port))) => *port,
            (None, None) => 0,
        }
    }

    fn host(&self) -> &str {
        self.job.meet.as_ref().map_or("127.0.0.1", |(host, _)| host)
    }

    /// The name by which ranks find the store.
    pub(super) fn host_for_ranks(&self) -> String {
        if self.job.nodes == 1 {
            return "127.0.0.1".to_string();
        }
        if let Some(address) = self.job.interface {
            return address.to_string();
        }
        let seen: Vec<Option<IpAddr>> = self.nodes.iter().map(|node| node.meets_at).collect();
        host_for_all(self.host(), &seen)
    }

    /// Node 0 says what is to be done next.
    pub(super) fn publish(&mut self, number: u32, order: &Order) -> Result<(), LaunchError> {
        self.set(&format!("order/{number}"), &encode(order))
    }

    /// The last order; it waits a little until the others have read it, because the store ends with this process.
    pub(super) fn stop(&mut self, number: u32, order: &Order, inbox: &mut Inbox) {
        if self.client.is_none() || self.publish(number, order).is_err() {
            return;
        }
        let start = Instant::now();
        for node in 1..self.job.nodes {
            let is_there = |meeting: &mut Meeting| matches!(meeting.claimant(node), Ok(Some(_)));
            let has_read = |meeting: &mut Meeting| meeting.has(&format!("bye/{node}")).unwrap_or(true);
            while start.elapsed() < GOODBYES
                && inbox.lost.iter().all(|lost| lost.node != node)
                && is_there(self)
                && !has_read(self)
            {
                inbox.wait(TICK);
            }
        }
    }

    /// The others wait for what is to be done next.
    pub(super) fn order(&mut self, number: u32, inbox: &mut Inbox) -> Result<Order, LaunchError> {
        let key = format!("order/{number}");
        loop {
            if self.has(&key)? {
                let order = self.get(&key)?;
                if matches!(order, Order::Stop { .. }) {
                    self.set(&format!("bye/{}", self.job.node), b"")?;
                }
                return Ok(order);
            }
            inbox.wait(TICK);
            match number {
                0 => self.leave_if_asked(inbox)?,
                _ => self.tell(number, false, inbox),
            }
            self.check_lead(inbox)?;
            if let (true, Some(signal)) = (inbox.kill, inbox.stop) {
                return Err(LaunchError::Stopped(signal));
            }
        }
    }

    /// An error, if node 0 is gone.
    pub(super) fn check_lead(&self, inbox: &Inbox) -> Result<(), LaunchError> {
        match inbox.lost.iter().find(|lost| lost.node == 0) {
            Some(lost) => Err(LaunchError::LeadLost { host: lost.host.clone(), why: lost.why.clone() }),
            None => Ok(()),
        }
    }

    /// Tells all what they must know at once.
    pub(super) fn tell(&mut self, attempt: u32, is_failing: bool, inbox: &Inbox) {
        // A store that is gone is noticed by the watch.
        if is_failing && self.told_failing != Some(attempt) {
            self.told_failing = Some(attempt);
            let _ = self.set(&format!("failing/{attempt}"), b"");
        }
        if let Some(signal) = inbox.stop
            && !self.told_leaving
        {
            self.told_leaving = true;
            if !inbox.stop_is_theirs {
                let _ = self.set("leaving", signal.to_string().as_bytes());
            }
        }
    }

    /// Tells node 0 how the ranks of this one ended.
    pub(super) fn report(&mut self, attempt: u32, ends: &[RankEnd]) -> Result<(), LaunchError> {
        self.set(&format!("ended/{attempt}/{}", self.job.node), &encode(&ends))
    }

    /// How the ranks of the other nodes ended, those excepted that are gone.
    pub(super) fn gather(&mut self, attempt: u32, inbox: &mut Inbox) -> Result<Vec<RankEnd>, LaunchError> {
        let mut ends = Vec::new();
        for node in 1..self.job.nodes {
            let key = format!("ended/{attempt}/{node}");
            loop {
                if self.has(&key)? {
                    ends.extend(self.get::<Vec<RankEnd>>(&key)?);
                    break;
                }
                if inbox.kill || inbox.lost.iter().any(|lost| lost.node == node) {
                    break;
                }
                inbox.wait(TICK);
                let is_lost = inbox.lost.iter().any(|lost| lost.node == node);
                self.tell(attempt, is_lost, inbox);
            }
        }
        Ok(ends)
    }

    /// What the store answers; `alone` where there is none, because there are no other nodes.
    pub(super) fn ask<T>(
        &mut self,
        alone: T,
        question: impl FnOnce(&mut Client) -> Result<T, StoreError>,
    ) -> Result<T, LaunchError> {
        match &mut self.client {
            Some(client) => question(client).map_err(|error| lost(self.job, error)),
            None => Ok(alone),
        }
    }

    pub(super) fn has(&mut self, key: &str) -> Result<bool, LaunchError> {
        self.ask(false, |client| client.has(key))
    }

    fn set(&mut self, key: &str, value: &[u8]) -> Result<(), LaunchError> {
        self.ask((), |client| client.set(key, value))
    }

    /// The value of a key that is there.
    pub(super) fn value(&mut self, key: &str) -> Result<Vec<u8>, LaunchError> {
        self.ask(Vec::new(), |client| client.get(key, ANSWER))
    }

    fn get<T: DeserializeOwned>(&mut self, key: &str) -> Result<T, LaunchError> {
        let value = self.value(key)?;
        decode(key, &value)
    }
}

pub(super) fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LaunchError> {
    serde_json::from_slice(value).map_err(|_| LaunchError::Garbled { key: format!("{PREFIX}{key}") })
}

pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    // Types of this folder: strings, numbers and lists of them, which JSON can hold.
    serde_json::to_vec(value).unwrap_or_default()
}

/// A store that was there: it ended with its launcher.
fn lost(job: &Job, error: StoreError) -> LaunchError {
    let host = job.meet.as_ref().map_or("127.0.0.1", |(host, _)| host).to_string();
    LaunchError::LeadLost { host, why: error.to_string() }
}
