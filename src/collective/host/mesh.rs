//! A connection from every rank to every other.

use super::super::CollectiveError;
use super::stream::{Listener, Stream, wait};
use crate::machine::raise_descriptor_limit;
use crate::rendezvous::store::{Client, StoreError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What a connection begins with, before the run's token and the rank.
const MAGIC: [u8; 8] = *b"ddpm-co1";
const HELLO: usize = 8 + 8 + 4;
/// How long a connection may take to say who it is. It holds up nobody else meanwhile.
pub(super) const GREETING: Duration = Duration::from_secs(2);
/// Connections that may be about to say it; a further one replaces the oldest.
const NEWCOMERS: usize = 64;

/// How ranks find each other.
#[derive(Debug)]
pub struct Meeting {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Whether all ranks are on this machine: then they share memory, and nobody else can connect.
    pub one_machine: bool,
    /// Where they tell each other their addresses, and later who was lost first.
    pub store: Client,
    /// How long to wait for those who have not come.
    pub patience: Duration,
}

/// Why ranks did not find each other.
#[derive(Debug, Error)]
pub enum MeetingError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A rank that did not come.
    #[error("ranks {missing:?} of {size} have not come within {} s: see their logs for why", .after.as_secs())]
    Missing {
        /// Who.
        missing: Vec<usize>,
        /// Number of ranks.
        size: usize,
        /// How long they were waited for.
        after: Duration,
    },
    /// A rank that is not where it said.
    #[error(
        "rank {peer} cannot be reached at {address}, the address that it gave: {source}; if that is another network than the one between the \
         machines, choose it with --interface, for all ranks"
    )]
    Unreachable {
        /// Who.
        peer: usize,
        /// Its address.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// Two processes with one number.
    #[error("two processes say they are rank {rank}: give each its own number")]
    Twice {
        /// The number.
        rank: usize,
    },
    /// A rank that was lost again before all had met.
    #[error(transparent)]
    Parted(#[from] CollectiveError),
    /// The system.
    #[error("cannot {action} to meet the other ranks: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> MeetingError {
    move |source| MeetingError::Io { action, source }
}

/// The connections of one rank.
#[derive(Debug)]
pub(super) struct Mesh {
    pub rank: usize,
    pub size: usize,
    /// Why they are TCP though the ranks are on one machine.
    pub notice: Option<String>,
    /// One for each rank but this.
    streams: Vec<Option<Stream>>,
}

impl Mesh {
    /// The connection to another rank.
    ///
    /// # Panics
    /// If it is this rank.
    pub fn stream(&self, peer: usize) -> &Stream {
        match &self.streams[peer] {
            Some(stream) => stream,
            None => panic!("rank {peer} sends itself a message"),
        }
    }

    /// The other ranks.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |&other| other != rank)
    }

    /// Whether a rank has closed its connection, whatever it sent before.
    pub fn has_hung_up(&self, peer: usize) -> bool {
        let Some(Some(stream)) = self.streams.get(peer) else { return false };
        let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok() && sockets[0].revents().intersects(closed)
    }

    /// Listens, says where, connects to the ranks below and is connected to by those above.
    pub fn join(meeting: &mut Meeting) -> Result<Mesh, MeetingError> {
        let Meeting { rank, size, one_machine, ref mut store, patience } = *meeting;
        let start = Instant::now();
        let left = || patience.saturating_sub(start.elapsed());
        raise_descriptor_limit();
        let mut streams: Vec<Option<Stream>> = (0..size).map(|_| None).collect();
        if store.add(&format!("collective/claim/{rank}"), 1)? != 1 {
            return Err(MeetingError::Twice { rank });
        }
        let number = RandomState::new().hash_one(std::process::id());
        let mut notice = None;
        let listener = if one_machine {
            Listener::unix(&format!("ddpm-dist-{number:016x}-{rank}")).or_else(|error| {
                notice = Some(format!("no Unix socket ({error})"));
                Listener::tcp(IpAddr::V4(Ipv4Addr::LOCALHOST))
            })
        } else {
            Listener::tcp(store.local_address()?)
        };
        let listener = listener.map_err(io_error("listen"))?;
        let address = listener.address().map_err(io_error("listen"))?;
        if rank == 0 {
            // Not a secret from those who can read the store; it keeps strangers and other runs apart.
            store.set("collective/token", &number.to_le_bytes())?;
        }
        store.set(&format!("collective/address/{rank}"), address.as_bytes())?;
        let token = store.get("collective/token", left())?;
        let hello = |rank: usize| [&MAGIC[..], &token, &(rank as u32).to_le_bytes()].concat();

        for (peer, stream) in streams.iter_mut().enumerate().take(rank) {
            let theirs = store.get(&format!("collective/address/{peer}"), left());
            let theirs = theirs.map_err(|error| match error {
                StoreError::TimedOut { .. } => MeetingError::Missing { missing: vec![peer], size, after: patience },
                other => MeetingError::Store(other),
            })?;
            let theirs = String::from_utf8_lossy(&theirs);
            let greeted = Stream::connect(&theirs, left())
                .and_then(|connection| (&connection).write_all(&hello(rank)).map(|()| connection));
            let unreachable = |source| MeetingError::Unreachable { peer, address: theirs.into_owned(), source };
            *stream = Some(greeted.map_err(unreachable)?);
        }
        let mut newcomers: Vec<Newcomer> = Vec::new();
        while streams[rank + 1..].iter().any(Option::is_none) {
            if left().is_zero() {
                let missing = (rank + 1..size).filter(|&peer| streams[peer].is_none()).collect();
                return Err(MeetingError::Missing { missing, size, after: patience });
            }
            await_word(&listener, &newcomers, left()).map_err(io_error("wait for a connection"))?;
            // All at once: one that is slow to say who it is, or never does, holds up nobody.
            if let Some(stream) = listener.accept().map_err(io_error("accept a connection"))? {
                if newcomers.len() == NEWCOMERS {
                    newcomers.remove(0);
                }
                newcomers.push(Newcomer { stream, said: [0; HELLO], heard: 0, since: Instant::now() });
            }
            newcomers.iter_mut().for_each(Newcomer::listen);
            for newcomer in newcomers.extract_if(.., |newcomer| newcomer.heard == HELLO) {
                // Whoever says something else is no rank of this run.
                let peer = (rank + 1..size).find(|&peer| newcomer.said[..] == hello(peer));
                if let Some(free) = peer.map(|peer| &mut streams[peer]).filter(|stream| stream.is_none()) {
                    *free = Some(newcomer.stream);
                }
            }
            newcomers.retain(|newcomer| newcomer.since.elapsed() < GREETING);
        }
        Ok(Mesh { rank, size, notice, streams })
    }
}

/// A connection that has not said yet who it is.
struct Newcomer {
    stream: Stream,
    said: [u8; HELLO],
    heard: usize,
    since: Instant,
}

impl Newcomer {
    /// Reads what has come of its greeting, and no more.
    fn listen(&mut self) {
        while self.heard < HELLO {
            match (&self.stream).read(&mut self.said[self.heard..]) {
                Ok(n) if n > 0 => self.heard += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => {
                    // It is gone: nothing it could have said is a greeting.
                    (self.said, self.heard) = ([0; HELLO], HELLO);
                }
            }
        }
    }
}

/// Waits for a connection, for a word of one that is there, or until one has taken too long.
fn await_word(listener: &Listener, newcomers: &[Newcomer], left: Duration) -> io::Result<()> {
    let mut descriptors = vec![PollFd::new(listener, PollFlags::IN)];
    descriptors.extend(newcomers.iter().map(|newcomer| PollFd::new(&newcomer.stream, PollFlags::IN)));
    let tired = newcomers.iter().map(|newcomer| GREETING.saturating_sub(newcomer.since.elapsed())).min();
    wait(&mut descriptors, left.min(tired.unwrap_or(left)))
}
