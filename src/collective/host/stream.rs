//! Connections between ranks: TCP, or on one machine a Unix socket, which can pass a window on.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// Pause before another attempt at a peer whose queue of connections is full.
const RETRY: Duration = Duration::from_millis(5);

/// A connection, on which nothing blocks.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects to where a [`Listener`] listens.
    pub fn connect(address: &str, patience: Duration) -> io::Result<Stream> {
        let unknown = || io::Error::new(ErrorKind::InvalidData, format!("`{address}` is no address of a rank"));
        let stream = if let Some(name) = address.strip_prefix("unix:") {
            let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            let start = Instant::now();
            while let Err(e) = rustix::net::connect(&socket, &address) {
                if e != Errno::AGAIN || start.elapsed() >= patience {
                    return Err(e.into());
                }
                std::thread::sleep(RETRY);
            }
            Stream::Unix(socket.into())
        } else {
            let address: SocketAddr = address.strip_prefix("tcp:").and_then(|a| a.parse().ok()).ok_or_else(unknown)?;
            Stream::Tcp(TcpStream::connect_timeout(&address, patience.max(Duration::from_millis(1)))?)
        };
        stream.ready()
    }

    fn ready(self) -> io::Result<Stream> {
        match &self {
            Stream::Tcp(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
            }
            Stream::Unix(stream) => stream.set_nonblocking(true)?,
        }
        Ok(self)
    }

    /// Sends one byte, and a descriptor with it.
    ///
    /// # Errors
    /// A connection that can carry none, or is broken.
    pub fn pass(&self, byte: u8, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = file.as_slice();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !file.is_empty() && !control.push(SendAncillaryMessage::ScmRights(file)) {
            return Err(ErrorKind::InvalidInput.into());
        }
        rustix::net::sendmsg(self, &[IoSlice::new(&[byte])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Receives what a peer has [passed](Self::pass).
    ///
    /// # Errors
    /// A peer that is gone, or silent until `patience` is over.
    pub fn receive(&self, patience: Duration) -> io::Result<(u8, Option<OwnedFd>)> {
        let start = Instant::now();
        loop {
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            wait(&mut [PollFd::new(self, PollFlags::IN)], left)?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            match rustix::net::recvmsg(self, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    let files = control.drain().filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(files) => Some(files),
                        _ => None,
                    });
                    return Ok((byte[0], files.flatten().next()));
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Waits until a descriptor is ready or `patience` is over.
pub(super) fn wait(descriptors: &mut [PollFd<'_>], patience: Duration) -> io::Result<()> {
    let timeout =
        Timespec { tv_sec: patience.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: patience.subsec_nanos().into() };
    match poll(descriptors, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

impl Read for &Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).read(out),
            Stream::Unix(stream) => (&*stream).read(out),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).write(bytes),
            Stream::Unix(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Where ranks connect to.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub fn tcp(here: IpAddr) -> io::Result<Listener> {
        let listener = TcpListener::bind(SocketAddr::new(here, 0))?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Tcp(listener))
    }

    /// A socket whose name is in no file system, and gone with it.
    pub fn unix(name: &str) -> io::Result<Listener> {
        let listener = UnixListener::bind_addr(&UnixAddress::from_abstract_name(name)?)?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Unix(listener))
    }

    /// What [`Stream::connect`] takes.
    pub fn address(&self) -> io::Result<String> {
        match self {
            Listener::Tcp(listener) => Ok(format!("tcp:{}", listener.local_addr()?)),
            Listener::Unix(listener) => {
                let address = listener.local_addr()?;
                let name = address.as_abstract_name().ok_or(ErrorKind::InvalidData)?;
                Ok(format!("unix:{}", String::from_utf8_lossy(name)))
            }
        }
    }

    /// The next connection, if there is one.
    pub fn accept(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Listener::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
        };
        match accepted {
            Ok(stream) => stream.ready().map(Some),
            // Nobody there after all, or gone again.
            Err(e) => match e.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(e),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Unix(listener) => listener.as_fd(),
        }
    }
}
