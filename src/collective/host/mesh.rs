//! A connection from every rank to every other.

use crate::rendezvous::store::{Client, StoreError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What a connection begins with, before the run's token and the rank.
const MAGIC: [u8; 8] = *b"ddpm-co1";
const HELLO: usize = 8 + 8 + 4;
/// How long a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(2);

/// How ranks find each other.
#[derive(Debug)]
pub struct Meeting {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Whether all ranks are on this machine: then nobody else can connect.
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
    /// Two processes with one number.
    #[error("two processes say they are rank {rank}: give each its own number")]
    Twice {
        /// The number.
        rank: usize,
    },
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
    /// One for each rank but this.
    streams: Vec<Option<TcpStream>>,
}

impl Mesh {
    /// The connection to another rank.
    ///
    /// # Panics
    /// If it is this rank.
    pub fn stream(&self, peer: usize) -> &TcpStream {
        match &self.streams[peer] {
            Some(stream) => stream,
            None => panic!("rank {peer} sends itself a message"),
        }
    }

    /// Listens, says where, connects to the ranks below and is connected to by those above.
    pub fn join(meeting: &mut Meeting) -> Result<Mesh, MeetingError> {
        let Meeting { rank, size, one_machine, ref mut store, patience } = *meeting;
        let start = Instant::now();
        let left = || patience.saturating_sub(start.elapsed());
        let mut streams: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
        if store.add(&format!("collective/claim/{rank}"), 1)? != 1 {
            return Err(MeetingError::Twice { rank });
        }
        let here = if one_machine { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { store.local_address()? };
        let listener = TcpListener::bind(SocketAddr::new(here, 0)).map_err(io_error("listen"))?;
        let address = listener.local_addr().map_err(io_error("listen"))?;
        if rank == 0 {
            // Not a secret from those who can read the store; it keeps strangers and other runs apart.
            store.set("collective/token", &RandomState::new().hash_one(std::process::id()).to_le_bytes())?;
        }
        store.set(&format!("collective/address/{rank}"), address.to_string().as_bytes())?;
        let token = store.get("collective/token", left())?;
        let hello = |rank: usize| [&MAGIC[..], &token, &(rank as u32).to_le_bytes()].concat();

        for (peer, stream) in streams.iter_mut().enumerate().take(rank) {
            let theirs = store.get(&format!("collective/address/{peer}"), left());
            let theirs = theirs.map_err(|error| match error {
                StoreError::TimedOut { .. } => MeetingError::Missing { missing: vec![peer], size, after: patience },
                other => MeetingError::Store(other),
            })?;
            let theirs: SocketAddr = String::from_utf8_lossy(&theirs).parse().map_err(|_| {
                let source = io::Error::new(ErrorKind::InvalidData, "the store holds no address for it");
                MeetingError::Io { action: "read where a rank is", source }
            })?;
            let mut connection = TcpStream::connect_timeout(&theirs, left().max(Duration::from_millis(1)))
                .map_err(io_error("connect to a rank"))?;
            connection.write_all(&hello(rank)).map_err(io_error("greet a rank"))?;
            *stream = Some(connection);
        }
        let above = rank + 1..size;
        while above.clone().any(|peer| streams[peer].is_none()) {
            let Some(connection) = accept(&listener, left()).map_err(io_error("accept a connection"))? else {
                let missing = above.filter(|&peer| streams[peer].is_none()).collect();
                return Err(MeetingError::Missing { missing, size, after: patience });
            };
            // Whoever says something else is no rank of this run.
            if let Some(peer) = hear(&connection).and_then(|said| above.clone().find(|&peer| said[..] == hello(peer))) {
                streams[peer] = Some(connection);
            }
        }
        for stream in streams.iter().flatten() {
            stream.set_nodelay(true).map_err(io_error("set up a connection"))?;
            stream.set_nonblocking(true).map_err(io_error("set up a connection"))?;
        }
        Ok(Mesh { rank, size, streams })
    }
}

/// The next connection, or nothing if none comes in time.
fn accept(listener: &TcpListener, patience: Duration) -> io::Result<Option<TcpStream>> {
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)) {
        Ok(0) => Ok(None),
        Ok(_) => listener.accept().map(|(stream, _)| Some(stream)),
        Err(rustix::io::Errno::INTR) if !patience.is_zero() => accept(listener, patience / 2),
        Err(e) => Err(e.into()),
    }
}

/// What a new connection says first.
fn hear(mut stream: &TcpStream) -> Option<[u8; HELLO]> {
    let mut said = [0; HELLO];
    stream.set_read_timeout(Some(GREETING)).ok()?;
    stream.read_exact(&mut said).ok()?;
    Some(said)
}
