//! What a run says: TensorBoard events, `log.jsonl`, progress on the terminal, pictures.
//!
//! Nothing here knows about training. Nothing here ends a run either: every failure (a full disk, say) is returned as a
//! [`ReportError`], and files stay whole, so that the caller can raise an alarm and go on.

mod alarm;
mod append;
mod atomic;
mod error;
mod event;
mod gif;
mod grid;
mod jsonl;
mod npy;
mod output;
mod progress;
mod stream;
mod tensorboard;

pub use alarm::FileAlarm;
pub use atomic::write_atomically;
pub use error::ReportError;
pub use gif::write_gif;
pub use grid::{GridOptions, Images, Picture, grid, to_u8};
pub use jsonl::JsonLines;
pub use npy::{read_npy, write_npy, write_npz};
pub use output::{OutputFormat, check_output, write_folder, write_images};
pub use progress::{Bar, Console, TrainingBar, Verbosity, duration};
pub use stream::ImageStream;
pub use tensorboard::TensorBoard;
