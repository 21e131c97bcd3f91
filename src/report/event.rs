//! TensorBoard's `Event` message, made of the types that `tensorboard-rs` is made of.
//!
//! Scalars are its summaries. Its image summary takes colour alone, panics on anything else, and encodes again what is a PNG already, so
//! that pictures are put into the message here.

use protobuf::{Message, ProtobufResult};
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_proto::summary::{Summary, Summary_Image, Summary_Value};
use tensorboard_rs::summary::scalar;

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
    Image { tag: &'a str, picture: &'a Picture, png: Vec<u8> },
}

/// The bytes of one event; `wall_time` in seconds since 1970.
///
/// # Errors
/// What the encoder says (a message beyond 4 GiB).
pub(super) fn encode(wall_time: f64, step: u64, what: What) -> ProtobufResult<Vec<u8>> {
    let mut event = Event::new();
    event.set_wall_time(wall_time);
    // Steps are below 2^32.
    event.set_step(step as i64);
    match what {
        What::FileVersion(version) => event.set_file_version(version.to_owned()),
        What::Restart => {
            let mut session_log = SessionLog::new();
            session_log.set_status(SessionLog_SessionStatus::START);
            event.set_session_log(session_log);
        }
        What::Scalars(scalars) => {
            let values = scalars.iter().flat_map(|(tag, value)| scalar(tag, *value as f32).take_value()).collect();
            event.set_summary(summary(values));
        }
        What::Image { tag, picture, png } => {
            let mut image = Summary_Image::new();
            image.set_height(picture.height() as i32);
            image.set_width(picture.width() as i32);
            image.set_colorspace(picture.channels() as i32); // 1 grey, 3 RGB
            image.set_encoded_image_string(png);
            let mut value = Summary_Value::new();
            value.set_tag(tag.to_owned());
            value.set_image(image);
            event.set_summary(summary(vec![value]));
        }
    }
    event.write_to_bytes()
}

fn summary(values: Vec<Summary_Value>) -> Summary {
    let mut summary = Summary::new();
    summary.set_value(values.into());
    summary
}
