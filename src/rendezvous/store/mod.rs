//! Keys and values that all ranks share, behind a socket.
//!
//! The protocol is that of PyTorch's `TCPStore`, so that one [`Client`] meets torchrun's agent and our own [`Server`] alike. A request is
//! one byte that says what, and its operands; integers are little-endian, strings and values a u64 length and their bytes. The first
//! request of a connection is `VALIDATE`; what is malformed ends the connection.
//!
//! | request | operands | answer |
//! |---|---|---|
//! | `VALIDATE` 0 | u32 `0x3C85F7CE` | |
//! | `SET` 1 | key, value | |
//! | `COMPARE_SET` 2 | key, expected, desired | value: the desired one if it was set |
//! | `GET` 3 | key, which must be there | value |
//! | `ADD` 4 | key, i64 | i64: the sum, kept as decimal text |
//! | `CHECK` 5 | u64 count, keys | u8: 0 if all are there, else 1 |
//! | `WAIT` 6 | u64 count, keys | u8 0, when all are there |
//! | `KEYS` 7 | | i64: how many there are |
//! | `DELETE` 8 | key | i64: 1 if it was there |
//! | `APPEND` 9 | key, value | |
//! | `CANCEL_WAIT` 12 | | u8 1, perhaps after the 0 of a wait that was over meanwhile |
//! | `PING` 13 | u32 | the same u32 |

mod client;
mod serve;
mod server;
mod wire;

pub use client::{Client, StoreError};
pub(super) use serve::addresses;
pub use serve::{Place, ServeError, serve};
pub use server::Server;
