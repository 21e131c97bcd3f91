//! TensorBoard's `Event` message in protocol buffer wire format.
//!
//! The crate `tensorboard-rs` keeps its event types to itself (its writer builds them), so the few fields used here are
//! encoded directly; numbers and types are those of TensorBoard's `event.proto` and `summary.proto`.

use super::Picture;

/// What an event carries.
pub(super) enum What<'a> {
    /// The version of the format, the first event of every file.
    FileVersion(&'a str),
    /// The run goes on at this event's step: what earlier files say about it and later steps is void.
    Restart,
    /// Numbers by tag.
    Scalars(&'a [(&'a str, f64)]),
    /// A picture with its PNG encoding.
    Image { tag: &'a str, picture: &'a Picture, png: &'a [u8] },
}

/// The bytes of one event; `wall_time` in seconds since 1970.
pub(super) fn encode(wall_time: f64, step: u64, what: &What) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time);
    event.varint(2, step);
    match what {
        What::FileVersion(version) => event.bytes(3, version.as_bytes()),
        What::Restart => {
            let mut session_log = Message::default();
            session_log.varint(1, 1); // status = START
            event.bytes(7, &session_log.0);
        }
        What::Scalars(scalars) => {
            let mut summary = Message::default();
            for (tag, value) in *scalars {
                let mut entry = Message::default();
                entry.bytes(1, tag.as_bytes());
                entry.float(2, *value as f32);
                summary.bytes(1, &entry.0);
            }
            event.bytes(5, &summary.0);
        }
        What::Image { tag, picture, png } => {
            let mut image = Message::default();
            image.varint(1, picture.height() as u64);
            image.varint(2, picture.width() as u64);
            image.varint(3, picture.channels() as u64); // colorspace: 1 grey, 3 RGB
            image.bytes(4, png);
            let mut entry = Message::default();
            entry.bytes(1, tag.as_bytes());
            entry.bytes(4, &image.0);
            let mut summary = Message::default();
            summary.bytes(1, &entry.0);
            event.bytes(5, &summary.0);
        }
    }
    event.0
}

/// A message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u8, value: u64) {
        self.0.push(field << 3);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u8, value: f64) {
        self.0.push((field << 3) | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, value: &[u8]) {
        self.0.push((field << 3) | 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u8, value: f32) {
        self.0.push((field << 3) | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}
