//! Requests as bytes.

use std::io::{self, Read};

/// What every connection begins with.
pub(super) const MAGIC: u32 = 0x3C85_F7CE;

/// Longest key in bytes, longest value, and most keys in a request: what is announced beyond these is not read (PyTorch has the same
/// limits). All keys of a request together are no longer than a value.
pub(super) const MAX_KEY: u64 = 8 << 10;
pub(super) const MAX_VALUE: u64 = 8 << 20;
pub(super) const MAX_KEYS: u64 = 128 << 10;

pub(super) const VALIDATE: u8 = 0;
pub(super) const SET: u8 = 1;
pub(super) const COMPARE_SET: u8 = 2;
pub(super) const GET: u8 = 3;
pub(super) const ADD: u8 = 4;
pub(super) const CHECK: u8 = 5;
pub(super) const WAIT: u8 = 6;
pub(super) const KEYS: u8 = 7;
pub(super) const DELETE: u8 = 8;
pub(super) const APPEND: u8 = 9;
pub(super) const CANCEL_WAIT: u8 = 12;
pub(super) const PING: u8 = 13;

/// Answers to `CHECK`.
pub(super) const READY: u8 = 0;
pub(super) const NOT_READY: u8 = 1;
/// Answers to `WAIT` and `CANCEL_WAIT`.
pub(super) const STOP_WAITING: u8 = 0;
pub(super) const WAIT_CANCELED: u8 = 1;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Validate(u32),
    Set { key: Vec<u8>, value: Vec<u8> },
    CompareSet { key: Vec<u8>, expected: Vec<u8>, desired: Vec<u8> },
    Get { key: Vec<u8> },
    Add { key: Vec<u8>, amount: i64 },
    Check { keys: Vec<Vec<u8>> },
    Wait { keys: Vec<Vec<u8>> },
    Keys,
    Delete { key: Vec<u8> },
    Append { key: Vec<u8>, value: Vec<u8> },
    CancelWait,
    Ping(u32),
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn put_keys(out: &mut Vec<u8>, keys: &[Vec<u8>]) {
    out.extend((keys.len() as u64).to_le_bytes());
    keys.iter().for_each(|key| put_bytes(out, key));
}

impl Request {
    /// Appends the request to `out`.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Request::Validate(magic) => {
                out.push(VALIDATE);
                out.extend(magic.to_le_bytes());
            }
            Request::Set { key, value } => {
                out.push(SET);
                put_bytes(out, key);
                put_bytes(out, value);
            }
            Request::CompareSet { key, expected, desired } => {
                out.push(COMPARE_SET);
                [key, expected, desired].into_iter().for_each(|bytes| put_bytes(out, bytes));
            }
            Request::Get { key } => {
                out.push(GET);
                put_bytes(out, key);
            }
            Request::Add { key, amount } => {
                out.push(ADD);
                put_bytes(out, key);
                out.extend(amount.to_le_bytes());
            }
            Request::Check { keys } => {
                out.push(CHECK);
                put_keys(out, keys);
            }
            Request::Wait { keys } => {
                out.push(WAIT);
                put_keys(out, keys);
            }
            Request::Keys => out.push(KEYS),
            Request::Delete { key } => {
                out.push(DELETE);
                put_bytes(out, key);
            }
            Request::Append { key, value } => {
                out.push(APPEND);
                put_bytes(out, key);
                put_bytes(out, value);
            }
            Request::CancelWait => out.push(CANCEL_WAIT),
            Request::Ping(number) => {
                out.push(PING);
                out.extend(number.to_le_bytes());
            }
        }
    }

    /// Reads one request; `None` where the connection ends before it begins.
    ///
    /// # Errors
    /// `InvalidData` for what is no request or too long, and whatever reading gives.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Request>> {
        let mut kind = [0];
        if from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        Ok(Some(match kind[0] {
            VALIDATE => Request::Validate(u32::from_le_bytes(array(from)?)),
            SET => Request::Set { key: key(from)?, value: value(from)? },
            COMPARE_SET => Request::CompareSet { key: key(from)?, expected: value(from)?, desired: value(from)? },
            GET => Request::Get { key: key(from)? },
            ADD => Request::Add { key: key(from)?, amount: i64::from_le_bytes(array(from)?) },
            CHECK => Request::Check { keys: keys(from)? },
            WAIT => Request::Wait { keys: keys(from)? },
            KEYS => Request::Keys,
            DELETE => Request::Delete { key: key(from)? },
            APPEND => Request::Append { key: key(from)?, value: value(from)? },
            CANCEL_WAIT => Request::CancelWait,
            PING => Request::Ping(u32::from_le_bytes(array(from)?)),
            other => return Err(invalid(format!("{other} is no request"))),
        }))
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn key(from: &mut impl Read) -> io::Result<Vec<u8>> {
    bytes(from, MAX_KEY)
}

/// A value: a length and as many bytes.
pub(super) fn value(from: &mut impl Read) -> io::Result<Vec<u8>> {
    bytes(from, MAX_VALUE)
}

/// `N` bytes.
pub(super) fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn bytes(from: &mut impl Read, most: u64) -> io::Result<Vec<u8>> {
    let len = u64::from_le_bytes(array(from)?);
    if len > most {
        return Err(invalid(format!("{len} bytes are announced, at most {most} are read")));
    }
    // Memory grows with what arrives, not with what is announced.
    let mut bytes = Vec::new();
    if from.take(len).read_to_end(&mut bytes)? as u64 != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

fn keys(from: &mut impl Read) -> io::Result<Vec<Vec<u8>>> {
    let count = u64::from_le_bytes(array(from)?);
    if count > MAX_KEYS {
        return Err(invalid(format!("{count} keys are announced, at most {MAX_KEYS} are read")));
    }
    let mut keys = Vec::new();
    let mut left = MAX_VALUE;
    for _ in 0..count {
        let key = bytes(from, MAX_KEY.min(left))?;
        left -= key.len() as u64;
        keys.push(key);
    }
    Ok(keys)
}
