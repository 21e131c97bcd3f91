//! What a person sees: bars on a terminal, plain lines at a bounded rate elsewhere, next to nothing with `-q`.
//!
//! Everything for people goes to stderr, so that stdout stays free for results. A stderr that went away (a closed pipe)
//! is no reason to stop, so failures to write there are ignored.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where there is no terminal, a bar says where it is this often.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
/// Times as long as that, numbers of a training run may be old.
const NEWS: u32 = 3;

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Nothing at all: another process says it.
    Silent,
    /// `-q`: errors, alarms and the last message.
    Quiet,
    /// Progress and messages.
    Normal,
    /// `-v`: details too.
    Verbose,
}

impl Verbosity {
    /// From the flags `-q` and `-v`; `-q` wins.
    pub fn from_flags(quiet: bool, verbose: bool) -> Verbosity {
        match (quiet, verbose) {
            (true, _) => Verbosity::Quiet,
            (false, true) => Verbosity::Verbose,
            (false, false) => Verbosity::Normal,
        }
    }
}

/// The place where messages and bars appear without disturbing each other. Clones share it; any thread may speak.
#[derive(Clone)]
pub struct Console {
    verbosity: Verbosity,
    /// `None` where there is no terminal.
    bars: Option<MultiProgress>,
    out: Arc<Mutex<dyn Write + Send>>,
    plain_every: Duration,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("verbosity", &self.verbosity).field("terminal", &self.bars.is_some()).finish()
    }
}

impl Console {
    /// Messages and bars on stderr; bars if that is a terminal that can show them.
    pub fn new(verbosity: Verbosity) -> Console {
        Console::with(verbosity, ProgressDrawTarget::stderr(), Arc::new(Mutex::new(io::stderr())), PLAIN_EVERY)
    }

    fn with(
        verbosity: Verbosity,
        target: ProgressDrawTarget,
        out: Arc<Mutex<dyn Write + Send>>,
        plain_every: Duration,
    ) -> Console {
        let shows_bars = verbosity > Verbosity::Quiet && !target.is_hidden();
        let bars = shows_bars.then(|| MultiProgress::with_draw_target(target));
        Console { verbosity, bars, out, plain_every }
    }

    /// How much is said.
    pub fn verbosity(&self) -> Verbosity {
        self.verbosity
    }

    /// A message for everyone but `-q`.
    pub fn say(&self, text: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Normal {
            self.line(text.as_ref());
        }
    }

    /// A message for `-v`.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Verbose {
            self.line(text.as_ref());
        }
    }

    /// Something is wrong and work goes on all the same: shown even with `-q`.
    pub fn alarm(&self, text: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Quiet {
            self.line(&format!("warning: {}", text.as_ref()));
        }
    }

    /// What an alarm told of is over: shown to everyone whom the alarm was shown to.
    pub fn all_clear(&self, text: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Quiet {
            self.line(text.as_ref());
        }
    }

    /// The reason why work stops: shown even with `-q`.
    pub fn error(&self, text: impl AsRef<str>) {
        self.line(&format!("error: {}", text.as_ref()));
    }

    /// What a run says when it is done: shown even with `-q`.
    pub fn last(&self, text: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Quiet {
            self.line(text.as_ref());
        }
    }

    /// A bar that counts to `total`: `what` is what happens to which things ("decoding images", "sampling").
    pub fn bar(&self, what: &str, total: u64) -> Bar {
        let style = "{prefix} {bar:30} {pos}/{len}  {eta} left";
        let drawn = self.drawn(style, what, 0, total);
        Bar { line: Line::new(self, drawn), what: what.to_owned(), total, done: Mutex::new(0) }
    }

    /// The bar of a training run that has done `done` of `steps` steps, each of `batch` images.
    pub fn training(&self, done: u64, steps: u64, batch: usize) -> TrainingBar {
        let drawn = self.drawn("step {pos}/{len} {wide_bar} {msg}", "", done, steps);
        TrainingBar { line: Line::new(self, drawn), steps, batch, shown: String::new(), reported: None }
    }

    fn drawn(&self, style: &str, prefix: &str, done: u64, total: u64) -> Option<ProgressBar> {
        let bars = self.bars.as_ref()?;
        let bar = bars.add(ProgressBar::new(total).with_position(done).with_prefix(prefix.to_owned()));
        // The templates are constants of this file; were one wrong, indicatif's own style would do.
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.reset_eta();
        bar.tick();
        Some(bar)
    }

    fn line(&self, text: &str) {
        let write = || {
            let mut out = lock(&self.out);
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

/// A poisoned lock means that another thread panicked while it spoke; what it guards is still fit for speaking.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bar where it is drawn, and the clock for plain lines where it is not.
struct Line {
    console: Console,
    drawn: Option<ProgressBar>,
    last: Mutex<Instant>,
}

impl Line {
    fn new(console: &Console, drawn: Option<ProgressBar>) -> Line {
        Line { console: console.clone(), drawn, last: Mutex::new(Instant::now()) }
    }

    /// Whether a plain line is due; if so, the clock starts anew.
    fn due(&self) -> bool {
        let mut last = lock(&self.last);
        let due = self.drawn.is_none() && last.elapsed() >= self.console.plain_every;
        if due {
            *last = Instant::now();
        }
        due
    }
}

impl Drop for Line {
    /// The bar vanishes, so that what follows (an error, the last message) stands on a clean line.
    fn drop(&mut self) {
        if let (Some(drawn), Some(bars)) = (&self.drawn, &self.console.bars) {
            drawn.finish_and_clear();
            bars.remove(drawn);
        }
    }
}

/// A bar over things that are counted; any thread may count. It vanishes when dropped.
pub struct Bar {
    line: Line,
    what: String,
    total: u64,
    done: Mutex<u64>,
}

impl Bar {
    /// `n` more are done.
    pub fn inc(&self, n: u64) {
        let mut done = lock(&self.done);
        *done += n;
        self.show(*done);
    }

    /// `done` are done in all.
    pub fn set(&self, done: u64) {
        *lock(&self.done) = done;
        self.show(done);
    }

    fn show(&self, done: u64) {
        match &self.line.drawn {
            Some(drawn) => drawn.set_position(done),
            None if self.line.due() => self.line.console.say(format!("{} {done}/{}", self.what, self.total)),
            None => {}
        }
    }
}

/// The bar of a training run: step, loss, images per second, time left. It vanishes when dropped.
pub struct TrainingBar {
    line: Line,
    steps: u64,
    batch: usize,
    shown: String,
    /// When numbers were last given.
    reported: Option<Instant>,
}

impl TrainingBar {
    /// `done` steps are done. Costs next to nothing, so it may be called at every step.
    pub fn advance(&self, done: u64) {
        if let Some(drawn) = &self.line.drawn {
            drawn.set_position(done);
        }
    }

    /// Whether a person should see numbers now: at the first step, and then at least every half minute, however rarely steps are logged.
    pub fn is_due(&self) -> bool {
        let patience = self.line.console.plain_every * NEWS;
        self.reported.is_none_or(|at| at.elapsed() >= patience)
    }

    /// The `loss` after `done` steps and the speed in images per second, from which the time left follows.
    pub fn report(&mut self, done: u64, loss: f64, images_per_second: f64) {
        let is_first = self.reported.replace(Instant::now()).is_none();
        self.shown.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.shown, "loss {loss:.4}  {} img/s", three_digits(images_per_second));
        let images_left = self.steps.saturating_sub(done) as f64 * self.batch as f64;
        if let Ok(left) = Duration::try_from_secs_f64(images_left / images_per_second) {
            let _ = write!(self.shown, "  {} left", duration(left));
        }
        match &self.line.drawn {
            Some(drawn) => {
                drawn.set_position(done);
                drawn.set_message(self.shown.clone());
            }
            None if self.line.due() || is_first || done == self.steps => {
                self.line.console.say(format!("step {done}/{}  {}", self.steps, self.shown));
            }
            None => {}
        }
    }
}

/// A speed with about three digits that matter.
fn three_digits(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

/// A time in its two largest units: `8s`, `3m 20s`, `2h 05m`, `4d 03h`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h {:02}m", minutes % 60),
        _ => format!("{days}d {:02}h", hours % 24),
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
pub(super) mod tests;
