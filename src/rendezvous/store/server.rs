//! A store of our own: one thread for each connection, all on one map.

use super::wire::{self, Request};
use rustix::net::SendFlags;
use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most bytes of keys and values in all.
const MAX_BYTES: usize = 256 << 20;
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 4096;
/// How long a connection may take to say what it is, and a client to take an answer.
const GREETING: Duration = Duration::from_secs(10);
/// Pause between two looks whether all have left.
const LOOK: Duration = Duration::from_millis(5);

/// A store that serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    closing: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    values: HashMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
    /// Where the answers of each connection go.
    connections: HashMap<u64, Arc<Answers>>,
    /// Connections that wait, each for all of its keys that are not there yet.
    waiting: HashMap<u64, Vec<Vec<u8>>>,
    next: u64,
}

/// The writing side of a connection. Locked after the state, and before the state is free again, so that answers stand in the order in
/// which they were decided on; a client that is slow to take a long one holds up nobody else.
#[derive(Debug)]
struct Answers(Mutex<TcpStream>);

impl Answers {
    fn lock(&self) -> MutexGuard<'_, TcpStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Listens on an address; port 0 lets the system choose one.
    ///
    /// # Errors
    /// An address that cannot be bound: in use, not this machine's, or not permitted.
    pub fn listen(address: SocketAddr) -> io::Result<Server> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let accepting = std::thread::Builder::new().name("store".into()).spawn(move || accept(&listener, &theirs))?;
        Ok(Server { address, shared, accepting: Some(accepting) })
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.shared.lock().values.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until nobody is connected any more: whoever serves the store must not leave before those who still read from it. Gives whether
    /// they had all left when `patience` was over.
    pub fn until_all_have_left(&self, patience: Duration) -> bool {
        let since = Instant::now();
        loop {
            if self.shared.lock().connections.is_empty() {
                return true;
            }
            if since.elapsed() >= patience {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts; it fails only if that is gone already.
        let _ = TcpStream::connect_timeout(&loopback(self.address), Duration::from_secs(1));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        for answers in self.shared.lock().connections.values() {
            let _ = answers.lock().shutdown(Shutdown::Both);
        }
    }
}

/// An address at which a listener on this machine is reached.
fn loopback(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked held no half-made change: every change is one insertion or removal.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors, or the client is gone again: others may have more luck.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let Ok(writer) = stream.try_clone() else { continue };
        let answers = Arc::new(Answers(Mutex::new(writer)));
        let id = {
            let mut state = shared.lock();
            if state.connections.len() >= MAX_CONNECTIONS {
                continue;
            }
            state.next += 1;
            let id = state.next;
            state.connections.insert(id, Arc::clone(&answers));
            id
        };
        let theirs = Arc::clone(shared);
        let spawned = std::thread::Builder::new().name(format!("store-{id}")).spawn(move || {
            // However the connection ends, the client sees it end.
            let _ = serve(&stream, &answers, id, &theirs);
            theirs.lock().forget(id);
        });
        if spawned.is_err() {
            shared.lock().forget(id);
        }
    }
}

/// Answers the requests of one connection until it ends or says something malformed.
fn serve(stream: &TcpStream, answers: &Answers, id: u64, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(GREETING))?;
    stream.set_read_timeout(Some(GREETING))?;
    let mut requests = BufReader::new(stream);
    if Request::read(&mut requests)? != Some(Request::Validate(wire::MAGIC)) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.set_read_timeout(None)?;
    while let Some(request) = Request::read(&mut requests)? {
        let mut state = shared.lock();
        let answer = state.answer(id, request)?;
        if !answer.is_empty() {
            let mut writer = answers.lock();
            drop(state);
            writer.write_all(&answer)?;
        }
    }
    Ok(())
}

impl State {
    fn forget(&mut self, id: u64) {
        self.waiting.remove(&id);
        if let Some(answers) = self.connections.remove(&id) {
            let _ = answers.lock().shutdown(Shutdown::Both);
        }
    }

    fn has_all(&self, keys: &[Vec<u8>]) -> bool {
        keys.iter().all(|key| self.values.contains_key(key))
    }

    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> io::Result<()> {
        let before = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - before + key.len() + value.len();
        if bytes > MAX_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes = bytes;
        self.values.insert(key, value);
        self.wake();
        Ok(())
    }

    /// Answers the waits that are over.
    fn wake(&mut self) {
        let over: Vec<u64> = self.waiting.iter().filter(|(_, keys)| self.has_all(keys)).map(|(id, _)| *id).collect();
        for id in over {
            self.waiting.remove(&id);
            if let Some(answers) = self.connections.get(&id) {
                // Nobody else writes to a connection that waits. One that has taken so little of its answers that there is no room for a
                // byte must not hold up the others: it is cut off, and its own thread forgets it.
                let writer = answers.lock();
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                if !matches!(rustix::net::send(&*writer, &[wire::STOP_WAITING], flags), Ok(1)) {
                    let _ = writer.shutdown(Shutdown::Both);
                }
            }
        }
    }

    /// What is to be sent back at once.
    fn answer(&mut self, id: u64, request: Request) -> io::Result<Vec<u8>> {
        let with_length = |value: &[u8]| [&(value.len() as u64).to_le_bytes()[..], value].concat();
        let nothing = Vec::new();
        if self.waiting.contains_key(&id) && request != Request::CancelWait {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(match request {
            Request::Validate(_) => return Err(io::ErrorKind::InvalidData.into()),
            Request::Set { key, value } => {
                self.put(key, value)?;
                nothing
            }
            Request::CompareSet { key, expected, desired } => {
                let holds = self.values.get(&key);
                if holds.is_none() && !expected.is_empty() {
                    with_length(&expected)
                } else if holds.is_none_or(|value| *value == expected) {
                    let answer = with_length(&desired);
                    self.put(key, desired)?;
                    answer
                } else {
                    with_length(holds.map_or(&[], Vec::as_slice))
                }
            }
            Request::Get { key } => match self.values.get(&key) {
                Some(value) => with_length(value),
                None => return Err(io::ErrorKind::NotFound.into()),
            },
            Request::Add { key, amount } => {
                let old = match self.values.get(&key) {
                    Some(value) => number(value)?,
                    None => 0,
                };
                let sum = old.wrapping_add(amount);
                self.put(key, sum.to_string().into_bytes())?;
                sum.to_le_bytes().to_vec()
            }
            Request::Check { keys } => vec![if self.has_all(&keys) { wire::READY } else { wire::NOT_READY }],
            Request::Wait { keys } if self.has_all(&keys) => vec![wire::STOP_WAITING],
            Request::Wait { keys } => {
                self.waiting.insert(id, keys);
                nothing
            }
            Request::CancelWait => {
                self.waiting.remove(&id);
                vec![wire::WAIT_CANCELED]
            }
            Request::Keys => (self.values.len() as i64).to_le_bytes().to_vec(),
            Request::Delete { key } => {
                let old = self.values.remove(&key);
                self.bytes -= old.as_ref().map_or(0, |old| key.len() + old.len());
                i64::from(old.is_some()).to_le_bytes().to_vec()
            }
            Request::Append { key, value } => {
                let mut all = self.values.get(&key).cloned().unwrap_or_default();
                all.extend(value);
                if all.len() as u64 > wire::MAX_VALUE {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                self.put(key, all)?;
                nothing
            }
            Request::Ping(number) => number.to_le_bytes().to_vec(),
        })
    }
}

/// A value that `ADD` has made or may add to.
fn number(value: &[u8]) -> io::Result<i64> {
    let text = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
    text.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
