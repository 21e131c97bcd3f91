//! A pool of threads that runs numbered tasks, and (in `chunks.rs`) safe helpers that hand each task its own part of the
//! outputs.
//!
//! Starting a run costs about a microsecond while the workers are awake: they spin for some tens of microseconds after
//! their last task, and sleep only then. A run allocates nothing. Which worker takes which task depends on timing, so a
//! task's result must depend on its number only; then results are the same at any number of threads.

mod chunks;

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Floats of scratch that every worker has from the start: what [`gemm`](super::gemm) needs at most.
pub const BASE_SCRATCH: usize = 1 << 18;

/// Floats of the scratch that a whole call (not one task) can lock: partial sums of split reductions.
pub(super) const COMMON_SCRATCH: usize = 1 << 21;

/// How long an idle worker, or a caller waiting for the last worker, spins before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// A task: its number and the scratch of the worker that runs it.
type Task<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Threads that wait for work; see the [module](self).
///
/// Dropping the pool ends and joins them.
pub struct Pool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    /// One for each worker. Only the worker whose number it is writes to it, and only during a run.
    scratch: Vec<Aligned>,
    /// Held during a run: the threads serve one caller at a time.
    running: Mutex<()>,
    common: Mutex<Aligned>,
}

/// What the caller publishes to the workers for one run.
#[derive(Clone, Copy)]
struct Job {
    /// Borrowed from the caller's frame, which outlives the run (see `Pool::run`).
    task: *const Task<'static>,
    tasks: usize,
    scratch: *const Aligned,
}

struct Shared {
    job: UnsafeCell<Option<Job>>,
    /// Number of the current run: a worker that sees a new value reads `job`.
    epoch: AtomicU64,
    next: AtomicUsize,
    /// Workers that have not finished the current run yet.
    busy: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Guards nothing: a thread about to sleep takes it, checks its condition again and waits, and a thread that made
    /// the condition true takes it before it notifies, so that no wake-up is lost.
    sleep: Mutex<()>,
    sleepers: AtomicUsize,
    work: Condvar,
    caller_sleeps: AtomicBool,
    done: Condvar,
}

// SAFETY: `job` is written only by the caller that holds `Pool::running`, while `busy` is zero, that is when no worker
// reads it; the release store of `epoch` publishes it. The pointers in it are to things that are Sync or owned per worker.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

thread_local! {
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool that runs tasks on `threads` threads, the caller of [`run`](Self::run) being one of them.
    ///
    /// At least one. Where the system refuses to start a thread the pool goes on with those it has:
    /// [`threads`](Self::threads) tells.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            sleepers: AtomicUsize::new(0),
            work: Condvar::new(),
            caller_sleeps: AtomicBool::new(false),
            done: Condvar::new(),
        });
        let mut handles = Vec::new();
        for worker in 1..threads.max(1) {
            let theirs = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("cpu-{worker}"));
            match builder.spawn(move || theirs.serve(worker)) {
                Ok(handle) => handles.push(handle),
                Err(_) => break,
            }
        }
        let scratch = (0..=handles.len()).map(|_| Aligned::new(BASE_SCRATCH)).collect();
        let common = Mutex::new(Aligned::new(COMMON_SCRATCH));
        Pool { shared, handles, scratch, running: Mutex::new(()), common }
    }

    /// Threads that run tasks, the caller included.
    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Makes every worker's scratch at least `floats_per_worker` long. Memory is taken from the system when first touched.
    pub fn reserve_scratch(&mut self, floats_per_worker: usize) {
        for scratch in &mut self.scratch {
            if scratch.len < floats_per_worker {
                *scratch = Aligned::new(floats_per_worker);
            }
        }
    }

    /// Length of each worker's scratch in floats.
    pub fn scratch_len(&self) -> usize {
        self.scratch[0].len
    }

    /// Calls `f(task, scratch)` once for each `task` in `0..tasks`, in any order and on any of the threads, and returns
    /// when all are done. `scratch` is 64-byte aligned, at least [`BASE_SCRATCH`] long and holds anything.
    ///
    /// # Panics
    /// With a task's own panic, when all workers have stopped (tasks not begun by then are left out); and when it is
    /// called from inside a task of any pool, which would have to wait for itself.
    pub fn run(&self, tasks: usize, f: &Task<'_>) {
        if tasks == 0 {
            return;
        }
        assert!(!IN_TASK.get(), "Pool::run was called from inside a task; a task must do its work alone");
        let _running = lock(&self.running);
        let _inside = Inside::enter();
        if tasks == 1 || self.handles.is_empty() {
            // SAFETY: worker 0 is this thread, and it holds `running`.
            let scratch = unsafe { self.scratch[0].slice() };
            return (0..tasks).for_each(|task| f(task, scratch));
        }
        let shared = &*self.shared;
        let task: *const Task<'_> = f;
        // SAFETY: this only forgets the lifetime of `f`. The pointer is used by workers between the store of `epoch` and
        // their decrement of `busy`, and this function does not return or unwind before `busy` is zero.
        let task: *const Task<'static> = unsafe { std::mem::transmute(task) };
        let job = Job { task, tasks, scratch: self.scratch.as_ptr() };
        // SAFETY: `busy` is zero, so no worker reads `job`; `running` is held, so no other caller writes it.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.handles.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.work.notify_all();
        }
        shared.take_tasks(&job, 0);
        shared.wait_for_workers();
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Scratch of one caller at a time, for results that pass from one run to the next.
    pub(super) fn common(&self) -> CommonScratch<'_> {
        CommonScratch(lock(&self.common))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.work.notify_all();
        for handle in self.handles.drain(..) {
            // A worker cannot panic: tasks run inside catch_unwind.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).field("scratch_len", &self.scratch_len()).finish()
    }
}

impl Shared {
    /// A worker's life.
    fn serve(&self, worker: usize) {
        IN_TASK.set(true);
        let mut seen = 0;
        loop {
            let news = || self.epoch.load(Ordering::Acquire) != seen || self.stop.load(Ordering::Acquire);
            if !spin_until(news) {
                let mut guard = lock(&self.sleep);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while self.epoch.load(Ordering::SeqCst) == seen && !self.stop.load(Ordering::SeqCst) {
                    guard = self.work.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch == seen {
                return; // stop
            }
            seen = epoch;
            // SAFETY: the caller wrote `job` before this epoch and does not write it again until this worker is done.
            if let Some(job) = unsafe { *self.job.get() } {
                self.take_tasks(&job, worker);
            }
            if self.busy.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_sleeps.load(Ordering::SeqCst) {
                drop(lock(&self.sleep));
                self.done.notify_one();
            }
        }
    }

    /// Runs tasks until none is left. A panic is kept for the caller and ends the run early.
    fn take_tasks(&self, job: &Job, worker: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the caller of this run keeps the scratch list and the task alive until `busy` is zero; each worker
            // uses the entry of its own number only.
            let (scratch, task) = unsafe { ((*job.scratch.add(worker)).slice(), &*job.task) };
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= job.tasks {
                    break;
                }
                task(i, scratch);
            }
        }));
        if let Err(panic) = outcome {
            self.next.store(job.tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    fn wait_for_workers(&self) {
        let done = || self.busy.load(Ordering::Acquire) == 0;
        if spin_until(done) {
            return;
        }
        let mut guard = lock(&self.sleep);
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while self.busy.load(Ordering::SeqCst) != 0 {
            guard = self.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }
}

/// Spins until `condition` holds; false if it did not within [`SPIN`].
fn spin_until(condition: impl Fn() -> bool) -> bool {
    // The clock is read rarely: on some virtual machines that is a system call.
    let mut since = None;
    loop {
        for _ in 0..64 {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        if since.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
    }
}

/// Locks in this module guard no invariant that a panic could break.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks this thread as running tasks, also while it unwinds.
struct Inside;

impl Inside {
    fn enter() -> Self {
        IN_TASK.set(true);
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        IN_TASK.set(false);
    }
}

/// The pool's shared scratch while it is locked.
pub(super) struct CommonScratch<'a>(MutexGuard<'a, Aligned>);

impl CommonScratch<'_> {
    pub(super) fn floats(&mut self) -> &mut [f32] {
        // SAFETY: the guard makes this the only reference.
        unsafe { self.0.slice() }
    }
}

/// A zeroed, 64-byte aligned run of floats.
struct Aligned {
    start: *mut f32,
    len: usize,
    /// Owns what `start` points into.
    _memory: Vec<f32>,
}

// SAFETY: it owns its memory.
unsafe impl Send for Aligned {}
// SAFETY: a shared reference gives access only through `slice`, whose caller promises exclusiveness.
unsafe impl Sync for Aligned {}

impl Aligned {
    fn new(len: usize) -> Self {
        const SPARE: usize = 64 / size_of::<f32>();
        // A zeroed vector comes from the system untouched; an aligned allocation would be written at once.
        let mut memory = vec![0.0f32; len + SPARE];
        let skip = memory.as_ptr().align_offset(64).min(SPARE);
        // SAFETY: at most SPARE floats in, so `len` of them follow.
        let start = unsafe { memory.as_mut_ptr().add(skip) };
        Aligned { start, len, _memory: memory }
    }

    /// # Safety
    /// No other slice of it may be alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self) -> &mut [f32] {
        // SAFETY: the memory is this long, was zeroed at the start, and the caller promises exclusiveness.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}
