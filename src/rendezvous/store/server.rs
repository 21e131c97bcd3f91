//! A store of our own: one thread for each connection, all on one map.

use super::super::MAX_RANKS;
use super::wire::{self, Request};
use crate::machine::raise_descriptor_limit;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sockopt};
use std::collections::HashMap;
use std::io::{self, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most bytes of keys and values in all.
const MAX_BYTES: usize = 256 << 20;
/// Most connections at a time: a rank has four (meeting, watchdog, request to stop, checkpoints), the launcher of a machine two.
const MAX_CONNECTIONS: usize = 6 * MAX_RANKS;
/// Connections that may wait to be accepted, as far as the system allows: all ranks come at once.
const BACKLOG: i32 = 4096;
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
    connections: HashMap<u64, Arc<Connection>>,
    /// Connections that wait, each for all of its keys that are not there yet.
    waiting: HashMap<u64, Vec<Vec<u8>>>,
    next: u64,
}

/// A connection, which one thread reads.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Who may write. Locked after the state, and before the state is free again, so that answers stand in the order in which they were
    /// decided on; a client that is slow to take a long one holds up nobody else.
    turn: Mutex<()>,
}

impl Connection {
    fn lock(&self) -> (MutexGuard<'_, ()>, &TcpStream) {
        (self.turn.lock().unwrap_or_else(PoisonError::into_inner), &self.stream)
    }

    /// Ends it: the client sees it end.
    fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A listener at all addresses of this machine, IPv4 ones too, whatever the system's default (`net.ipv6.bindv6only`).
fn listen_on_both(port: u16) -> io::Result<TcpListener> {
    let socket = rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_ipv6_v6only(&socket, false)?;
    rustix::net::bind(&socket, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

impl Server {
    /// Listens on an address; port 0 lets the system choose one.
    ///
    /// # Errors
    /// An address that cannot be bound: in use, not this machine's, or not permitted.
    pub fn listen(address: SocketAddr) -> io::Result<Server> {
        Server::start(TcpListener::bind(address)?)
    }

    /// Listens on all networks of this machine.
    ///
    /// # Errors
    /// A port that cannot be bound: in use, or not permitted.
    pub fn listen_everywhere(port: u16) -> io::Result<Server> {
        match listen_on_both(port) {
            Ok(listener) => Server::start(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
            // A system without IPv6.
            Err(_) => Server::listen((Ipv4Addr::UNSPECIFIED, port).into()),
        }
    }

    fn start(listener: TcpListener) -> io::Result<Server> {
        raise_descriptor_limit();
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
        self.shared.lock().connections.values().for_each(|connection| connection.hang_up());
    }
}

/// An address at which a listener on this machine is reached.
fn loopback(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
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
    let mut has_complained = false;
    loop {
        let accepted = listener.accept();
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if is_full(&error) && !has_complained {
                    has_complained = true;
                    complain(&error, shared.lock().connections.len());
                }
                // Or the client is gone again: others may have more luck.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        let Some((id, connection)) = shared.lock().admit(stream) else { continue };
        let theirs = Arc::clone(shared);
        let spawned = std::thread::Builder::new().name(format!("store-{id}")).spawn(move || {
            // However the connection ends, the client sees it end.
            let _ = serve(&connection, id, &theirs);
            theirs.lock().forget(id);
        });
        if let Err(error) = spawned {
            let connections = shared.lock().connections.len();
            shared.lock().forget(id);
            if !has_complained {
                has_complained = true;
                complain(&error, connections);
            }
        }
    }
}

/// Whether this process or the system has no file descriptor left.
fn is_full(error: &io::Error) -> bool {
    matches!(rustix::io::Errno::from_io_error(error), Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE))
}

/// Ranks that cannot be let in see nothing but a store that does not answer: whoever serves it must say why.
fn complain(error: &io::Error, connections: usize) {
    // Nobody may be there to read it.
    let _ = writeln!(
        io::stderr(),
        "warning: the store in which the ranks meet takes no more than {connections} connections: {error}; raise the limit of open files \
         (ulimit -Hn) and of processes (ulimit -u) where it is served"
    );
}

/// Answers the requests of one connection until it ends or says something malformed.
fn serve(connection: &Connection, id: u64, shared: &Shared) -> io::Result<()> {
    let stream = &connection.stream;
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
            let (_turn, mut writer) = connection.lock();
            drop(state);
            writer.write_all(&answer)?;
        }
    }
    Ok(())
}

impl State {
    /// Gives a connection its number, if there is room for it.
    fn admit(&mut self, stream: TcpStream) -> Option<(u64, Arc<Connection>)> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        self.next += 1;
        let connection = Arc::new(Connection { stream, turn: Mutex::new(()) });
        self.connections.insert(self.next, Arc::clone(&connection));
        Some((self.next, connection))
    }

    fn forget(&mut self, id: u64) {
        self.waiting.remove(&id);
        if let Some(connection) = self.connections.remove(&id) {
            connection.hang_up();
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
            if let Some(connection) = self.connections.get(&id) {
                // Nobody else writes to a connection that waits. One that has taken so little of its answers that there is no room for a
                // byte must not hold up the others: it is cut off, and its own thread forgets it.
                let (_turn, writer) = connection.lock();
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                if !matches!(rustix::net::send(writer, &[wire::STOP_WAITING], flags), Ok(1)) {
                    connection.hang_up();
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
