//! One round of messages between ranks, all under way at once, with a deadline.

use super::super::CollectiveError;
use super::mesh::Mesh;
use super::stream::{Stream, wait};
use rustix::event::{PollFd, PollFlags};
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

/// Most bytes of one rank in a gather, and so of what a rank may announce where the others do not know the length: some
/// hundred times what ranks tell each other (times, hashes, flags, numbers of an evaluation). Gradients are sums, whose length all know;
/// what else is large belongs into files. A rank of a world of 8 keeps at most 128 MiB.
pub(super) const MAX_BYTES: u64 = 16 << 20;

/// How much later than a rank others may give up, and still hear in time that it waits too.
const WAITERS: Duration = Duration::from_millis(300);

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Slices for those who add them up.
    Scatter = 1,
    /// Everyone's part for everyone.
    Gather,
    /// The length of what follows.
    Length,
    /// Where in a rank's memory its part is.
    Offer,
    /// That its slice of the sum is there.
    Summed,
    /// That it has taken the sum.
    Taken,
    /// That it has given up waiting for others: instead of whatever is due.
    Waits,
    /// Where in a rank's memory what it gives to all is.
    Share,
}

impl Kind {
    fn name(number: u8) -> &'static str {
        match number {
            1 => "all-reduce, slices,",
            2 => "gather",
            3 => "length",
            4 => "all-reduce, offer,",
            5 => "all-reduce, sum,",
            6 => "all-reduce, receipt,",
            8 => "all-gather, offer,",
            _ => "something unknown",
        }
    }
}

fn name(kind: Kind, sequence: u64) -> String {
    format!("{} number {sequence}", Kind::name(kind as u8))
}

/// What precedes every message: sequence number u64, length u64, kind u8, all little-endian.
const HEADER: usize = 17;

fn header(sequence: u64, kind: Kind, len: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&sequence.to_le_bytes());
    header[8..16].copy_from_slice(&(len as u64).to_le_bytes());
    header[16] = kind as u8;
    header
}

/// A length as a rank announced it, if it is one to believe.
pub(super) fn bounded(len: u64, rank: usize) -> Result<usize, CollectiveError> {
    match len {
        0..=MAX_BYTES => Ok(len as usize),
        _ => Err(CollectiveError::OutOfStep {
            rank,
            ours: format!("at most {MAX_BYTES} bytes"),
            theirs: format!("{len} bytes"),
        }),
    }
}

struct Outgoing<'a> {
    peer: usize,
    header: [u8; HEADER],
    body: &'a [u8],
    sent: usize,
}

struct Incoming<'a> {
    peer: usize,
    header: [u8; HEADER],
    body: &'a mut [u8],
    got: usize,
    /// Its rank waits for another itself: what is missing here is not its fault.
    waits: bool,
}

/// Messages of one operation: at most one to each rank and one from each.
pub(super) struct Round<'a> {
    mesh: &'a Mesh,
    kind: Kind,
    sequence: u64,
    /// What the headers say of the length, where it is not that of the message.
    about: Option<usize>,
    patience: Duration,
    sends: Vec<Outgoing<'a>>,
    receives: Vec<Incoming<'a>>,
}

impl<'a> Round<'a> {
    pub(super) fn new(mesh: &'a Mesh, kind: Kind, sequence: u64, patience: Duration) -> Self {
        Round { mesh, kind, sequence, about: None, patience, sends: Vec::new(), receives: Vec::new() }
    }

    /// Lets all messages say that they are about so many bytes, which the ranks must agree on.
    pub(super) fn about(mut self, bytes: usize) -> Self {
        self.about = Some(bytes);
        self
    }

    pub(super) fn send<'b>(&mut self, peer: usize, body: &'b [u8])
    where
        'b: 'a,
    {
        self.sends.push(Outgoing {
            peer,
            header: header(self.sequence, self.kind, self.about.unwrap_or(body.len())),
            body,
            sent: 0,
        });
    }

    pub(super) fn receive(&mut self, peer: usize, body: &'a mut [u8]) {
        self.receives.push(Incoming { peer, header: [0; HEADER], body, got: 0, waits: false });
    }

    fn name(&self) -> String {
        name(self.kind, self.sequence)
    }

    /// Sends and receives all messages.
    pub(super) fn run(mut self) -> Result<(), CollectiveError> {
        let start = Instant::now();
        loop {
            let (kind, sequence) = (self.kind, self.sequence);
            let lost = |rank: usize| {
                move |e: io::Error| {
                    let operation = format!("{} ({e})", name(kind, sequence));
                    CollectiveError::PeerLost { rank, operation }
                }
            };
            for out in &mut self.sends {
                out.advance(self.mesh.stream(out.peer)).map_err(lost(out.peer))?;
            }
            for incoming in &mut self.receives {
                match incoming.advance(self.mesh.stream(incoming.peer)) {
                    // It has waited, and gone: the time is up.
                    Err(_) if incoming.waits => return Err(self.give_up()),
                    advanced => advanced.map_err(lost(incoming.peer))?,
                }
                incoming.check(self.sequence, self.kind, self.about)?;
            }
            self.forget_the_done();
            if self.sends.is_empty() && self.receives.is_empty() {
                return Ok(());
            }
            let left = self.patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(self.give_up());
            }
            self.poll(left).map_err(|source| CollectiveError::Io { operation: self.name(), source })?;
        }
    }

    fn forget_the_done(&mut self) {
        self.sends.retain(|out| out.sent < HEADER + out.body.len());
        self.receives.retain(|incoming| incoming.got < HEADER + incoming.body.len());
    }

    /// Waits until a socket is ready, or `left` is over.
    fn poll(&self, left: Duration) -> io::Result<()> {
        let sends = self.sends.iter().map(|out| (out.peer, PollFlags::OUT));
        let receives = self.receives.iter().map(|incoming| (incoming.peer, PollFlags::IN));
        let mut sockets: Vec<PollFd<'_>> =
            sends.chain(receives).map(|(peer, flags)| PollFd::new(self.mesh.stream(peer), flags)).collect();
        wait(&mut sockets, left)
    }

    /// Names those whose message is missing; where none is, those who do not take ours. A rank that waits for another cannot have sent
    /// its message, so ranks that give up tell each other: who says nothing even then is the one that all wait for.
    fn give_up(mut self) -> CollectiveError {
        self.forget_the_done();
        let word = header(self.sequence, Kind::Waits, 0);
        for peer in self.mesh.others() {
            let is_amid_a_message = self.sends.iter().any(|out| out.peer == peer && out.sent > 0);
            if !is_amid_a_message {
                // Who takes no word finds out alone.
                let _ = self.mesh.stream(peer).write(&word);
            }
        }
        let (operation, end) = (self.name(), Instant::now() + WAITERS);
        loop {
            for incoming in self.receives.iter_mut().filter(|incoming| !incoming.waits) {
                // What is late, wrong or gone by now is as silent as before.
                let _ = incoming.advance(self.mesh.stream(incoming.peer));
                let _ = incoming.check(self.sequence, self.kind, self.about);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.receives.iter().all(|incoming| incoming.waits) {
                break;
            }
            std::thread::sleep(left.min(WAITERS / 30));
        }
        let silent = |incoming: &&Incoming<'_>| !incoming.waits;
        let mut ranks: Vec<usize> = self.receives.iter().filter(silent).map(|incoming| incoming.peer).collect();
        if ranks.is_empty() {
            ranks = self.receives.iter().map(|incoming| incoming.peer).collect();
        }
        if ranks.is_empty() {
            ranks = self.sends.iter().map(|out| out.peer).collect();
        }
        CollectiveError::TimedOut { ranks, operation, after: self.patience }
    }
}

impl Outgoing<'_> {
    fn advance(&mut self, mut stream: &Stream) -> io::Result<()> {
        while self.sent < HEADER + self.body.len() {
            let rest = match self.sent {
                0..HEADER => &self.header[self.sent..],
                _ => &self.body[self.sent - HEADER..],
            };
            match stream.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Incoming<'_> {
    fn advance(&mut self, mut stream: &Stream) -> io::Result<()> {
        while self.got < HEADER + self.body.len() {
            // The body is not read before the header is checked.
            let (rest, is_header) = match self.got {
                0..HEADER => (&mut self.header[self.got..], true),
                _ => (&mut self.body[self.got - HEADER..], false),
            };
            match stream.read(rest) {
                Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "it closed its connection")),
                Ok(n) => self.got += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if is_header && self.got == HEADER {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Compares the header, once it is there, with what is due.
    fn check(&mut self, sequence: u64, kind: Kind, about: Option<usize>) -> Result<(), CollectiveError> {
        let about = about.unwrap_or(self.body.len());
        let due = header(sequence, kind, about);
        if self.got < HEADER || self.header == due {
            return Ok(());
        }
        if self.header[16] == Kind::Waits as u8 {
            (self.waits, self.got) = (true, 0);
            return Ok(());
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let say = |kind: u8, sequence: u64, len: u64| format!("{} number {sequence} of {len} bytes", Kind::name(kind));
        Err(CollectiveError::OutOfStep {
            rank: self.peer,
            ours: say(kind as u8, sequence, about as u64),
            theirs: say(self.header[16], number(0), number(8)),
        })
    }
}
