//! One connection to a store.

use super::super::InterfaceError;
use super::wire::{self, Request};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Pause between two attempts to reach a store that does not answer yet.
const RETRY: Duration = Duration::from_millis(20);
/// How long a store may take over an answer that does not wait for other ranks.
const ANSWER: Duration = Duration::from_secs(30);

/// What can go wrong with a store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Nobody answers.
    #[error("the store at {address} cannot be reached within {} s: {source}; is rank 0, or the launcher, running there?", .after.as_secs())]
    Unreachable {
        /// Host and port.
        address: String,
        /// How long it was tried.
        after: Duration,
        /// The last attempt's error.
        source: io::Error,
    },
    /// A key did not appear.
    #[error("no other rank has set `{key}` in the store at {address} within {} s", .after.as_secs())]
    TimedOut {
        /// Host and port.
        address: String,
        /// The (first) key.
        key: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The way to the store is this machine's loopback, and others are to come.
    #[error(
        "this machine knows {host}, where the ranks meet, by its loopback address {found}, at which the other machines cannot reach it, and has no \
         other: choose its network with --interface"
    )]
    OnlyLoopback {
        /// Where the ranks meet.
        host: String,
        /// What it means here.
        found: IpAddr,
    },
    /// The system does not list the networks of this machine.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// The connection broke, or what answers is no store.
    #[error("the store at {address} is lost: {source}")]
    Lost {
        /// Host and port.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// A connection to a store. All keys are under a prefix, so that worlds that use one store do not meet each other's keys.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    address: String,
    prefix: String,
    /// Where this machine is to be reached, if not where the store sees it.
    reached_at: Option<IpAddr>,
    /// How long an answer may take that waits for nobody else.
    answer: Duration,
}

/// A stream until a moment, however slowly it says something.
struct Until<'a> {
    stream: &'a TcpStream,
    end: Instant,
}

impl Until<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(out)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn within(stream: &TcpStream, time: Duration) -> Until<'_> {
    Until { stream, end: Instant::now() + time }
}

impl Client {
    /// Connects, trying until `patience` is over: the rank that serves the store may start later than this one. All keys are under `prefix`.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`].
    pub fn connect(host: &str, port: u16, prefix: &str, patience: Duration) -> Result<Client, StoreError> {
        let start = Instant::now();
        let name = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        // What was found there before says more than that the time is up.
        let mut found = None;
        let stream = loop {
            let left = patience.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            match try_connect(host, port, left) {
                Ok(stream) => break stream,
                Err(source) => {
                    if found.is_none() || !matches!(source.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                        found = Some(source);
                    }
                    if let Some(source) = found.take_if(|_| start.elapsed() >= patience) {
                        return Err(StoreError::Unreachable { address: name, after: patience, source });
                    }
                    std::thread::sleep(RETRY.min(left));
                }
            }
        };
        Ok(Client { stream, address: name, prefix: prefix.to_string(), reached_at: None, answer: ANSWER })
    }

    /// Changes how long an answer may take that waits for no other rank (30 s at first), from now on.
    pub fn answer_within(&mut self, time: Duration) {
        self.answer = time;
    }

    /// Names the address at which other ranks are to reach this machine: one of another network than the store's.
    pub fn reach_at(&mut self, address: Option<IpAddr>) {
        self.reached_at = address;
    }

    /// An address of this machine that other ranks can reach: the one that the store sees, unless [another](Self::reach_at) was named.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn local_address(&self) -> Result<IpAddr, StoreError> {
        if let Some(address) = self.reached_at {
            return Ok(address);
        }
        self.stream.local_addr().map(|address| address.ip()).map_err(self.lost())
    }

    fn key(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.prefix).into_bytes()
    }

    fn lost(&self) -> impl FnOnce(io::Error) -> StoreError + use<'_> {
        |source| {
            // An answer that comes after all would be taken for that to another question.
            let _ = self.stream.shutdown(Shutdown::Both);
            StoreError::Lost { address: self.address.clone(), source }
        }
    }

    fn send(&mut self, request: &Request) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        within(&self.stream, self.answer).write_all(&bytes).map_err(self.lost())
    }

    fn answer<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        wire::array(&mut within(&self.stream, self.answer)).map_err(self.lost())
    }

    fn answer_value(&mut self) -> Result<Vec<u8>, StoreError> {
        wire::value(&mut within(&self.stream, self.answer)).map_err(self.lost())
    }

    /// Sets a key.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.send(&Request::Set { key: self.key(key), value: value.to_vec() })
    }

    /// Whether a key is there.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn has(&mut self, key: &str) -> Result<bool, StoreError> {
        self.send(&Request::Check { keys: vec![self.key(key)] })?;
        Ok(self.answer::<1>()? == [wire::READY])
    }

    /// The value of a key, for which it waits until `patience` is over.
    ///
    /// # Errors
    /// A key that does not appear, or a store that is lost.
    pub fn get(&mut self, key: &str, patience: Duration) -> Result<Vec<u8>, StoreError> {
        self.wait(&[key], patience)?;
        self.send(&Request::Get { key: self.key(key) })?;
        self.answer_value()
    }

    /// Returns when all keys are there.
    ///
    /// # Errors
    /// A key that does not appear, or a store that is lost.
    pub fn wait(&mut self, keys: &[&str], patience: Duration) -> Result<(), StoreError> {
        self.send(&Request::Wait { keys: keys.iter().map(|key| self.key(key)).collect() })?;
        let timeout = patience.max(Duration::from_millis(1));
        match wire::array::<1>(&mut within(&self.stream, timeout)) {
            Ok([wire::STOP_WAITING]) => Ok(()),
            Ok(other) => Err(self.lost()(unexpected(other[0]))),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                self.cancel_wait(keys, patience)
            }
            Err(e) => Err(self.lost()(e)),
        }
    }

    /// Takes a wait back. It may have ended meanwhile: then all keys are there after all.
    fn cancel_wait(&mut self, keys: &[&str], after: Duration) -> Result<(), StoreError> {
        self.send(&Request::CancelWait)?;
        match self.answer::<1>()? {
            [wire::WAIT_CANCELED] => {
                let key = keys.first().copied().unwrap_or_default().to_string();
                Err(StoreError::TimedOut { address: self.address.clone(), key, after })
            }
            [wire::STOP_WAITING] => match self.answer::<1>()? {
                [wire::WAIT_CANCELED] => Ok(()),
                [other] => Err(self.lost()(unexpected(other))),
            },
            [other] => Err(self.lost()(unexpected(other))),
        }
    }

    /// Adds to a number, which is 0 at first, and gives the sum.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn add(&mut self, key: &str, amount: i64) -> Result<i64, StoreError> {
        self.send(&Request::Add { key: self.key(key), amount })?;
        Ok(i64::from_le_bytes(self.answer()?))
    }

    /// Sets a key to `desired` if it holds `expected`, or is not there and `expected` is empty. Gives what it holds then.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn compare_set(&mut self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>, StoreError> {
        let (expected, desired) = (expected.to_vec(), desired.to_vec());
        self.send(&Request::CompareSet { key: self.key(key), expected, desired })?;
        self.answer_value()
    }

    /// Removes a key; gives whether it was there.
    ///
    /// # Errors
    /// A store that is lost.
    pub fn delete(&mut self, key: &str) -> Result<bool, StoreError> {
        self.send(&Request::Delete { key: self.key(key) })?;
        Ok(i64::from_le_bytes(self.answer()?) == 1)
    }
}

fn unexpected(answer: u8) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{answer} is no answer to what was asked"))
}

/// Connects to the first address of the host that answers like a store.
fn try_connect(host: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, patience).and_then(|stream| greet(stream, patience.min(ANSWER))) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Says what protocol this is, and hears whether the other side speaks it too.
fn greet(stream: TcpStream, patience: Duration) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let mut timed = within(&stream, patience);
    let number = std::process::id();
    let mut bytes = Vec::new();
    Request::Validate(wire::MAGIC).encode(&mut bytes);
    Request::Ping(number).encode(&mut bytes);
    timed.write_all(&bytes)?;
    match u32::from_le_bytes(wire::array(&mut timed)?) {
        answer if answer == number => Ok(stream),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "what listens there is no store")),
    }
}
