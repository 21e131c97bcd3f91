//! Memory of one rank that the other ranks of its machine can read.
//!
//! A [`Window`] is a file that exists only in memory (`memfd_create`), so that nothing is left of it when the last process that has it is
//! gone, however that ended. It is sealed: its size never changes, and only the mapping of its own rank can be written, which the kernel
//! enforces. So a rank's own [`Span`]s are its own like any memory; of the others' it makes copies ([`View::read`]), and the messages that
//! pass over the sockets say when what is there.

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::process::{Resource, getrlimit};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Addresses a window takes; memory is taken from the system as it is first used, up to the most that is under way at a time.
const SIZE: usize = (1u64 << 36) as usize;
/// Spans begin at multiples of this many bytes.
const PAGE: usize = 4096;

/// The memory of this rank, which it alone writes.
#[derive(Debug)]
pub(super) struct Window {
    map: MmapRaw,
    file: File,
    room: Mutex<Room>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Room {
    /// Bytes in use, in their order.
    used: Vec<Range<usize>>,
    /// Spans that will soon be free.
    returning: usize,
    /// Bytes taken from the system.
    taken: usize,
}

impl Room {
    /// The lowest place for that many bytes, and its number in `used`.
    fn place(&self, bytes: usize) -> (usize, Range<usize>) {
        let mut start = 0;
        for (i, used) in self.used.iter().enumerate() {
            if used.start - start >= bytes {
                return (i, start..start + bytes);
            }
            start = used.end;
        }
        (self.used.len(), start..start + bytes)
    }
}

impl Window {
    /// Makes an empty window.
    ///
    /// # Errors
    /// A system that has or permits no such memory.
    pub fn create() -> io::Result<Window> {
        // A file beyond this limit would end the process with a signal.
        if getrlimit(Resource::Fsize).current.is_some_and(|most| most < SIZE as u64) {
            return Err(io::Error::new(ErrorKind::FileTooLarge, "the limit on file sizes (ulimit -f) is too low"));
        }
        let file = rustix::fs::memfd_create("ddpm-dist", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, SIZE as u64)?;
        let file = File::from(file);
        let map = MmapOptions::new().len(SIZE).map_raw(&file)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(Window { map, file, room: Mutex::default(), freed: Condvar::new() })
    }

    /// What a peer needs to read it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, Room> {
        // Every change of it is made in one go.
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Space for `len` floats of any content. Waits for spans on their way back rather than take more memory than before.
    ///
    /// # Errors
    /// A machine without that much memory.
    pub fn allocate(self: &Arc<Window>, len: usize) -> io::Result<Span> {
        let no_room = || io::Error::from(ErrorKind::OutOfMemory);
        let bytes = len.max(1).checked_mul(size_of::<f32>()).and_then(|b| b.checked_next_multiple_of(PAGE));
        let bytes = bytes.filter(|bytes| *bytes <= SIZE).ok_or_else(no_room)?;
        let mut room = self.lock();
        loop {
            let (number, bytes) = room.place(bytes);
            if bytes.end > room.taken {
                if room.returning > 0 {
                    room = self.freed.wait(room).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                if bytes.end > SIZE {
                    return Err(no_room());
                }
                // Memory that the machine does not have is an error here, not a signal at the first use.
                let more = (bytes.end - room.taken) as u64;
                rustix::fs::fallocate(&self.file, FallocateFlags::empty(), room.taken as u64, more)?;
                room.taken = bytes.end;
            }
            room.used.insert(number, bytes.clone());
            return Ok(Span { window: Arc::clone(self), start: bytes.start, len, is_returning: false });
        }
    }

    #[cfg(test)]
    pub fn taken(&self) -> usize {
        self.lock().taken
    }
}

/// A part of this rank's window, free again when it is dropped.
#[derive(Debug)]
pub(super) struct Span {
    window: Arc<Window>,
    start: usize,
    len: usize,
    is_returning: bool,
}

impl Span {
    /// Where it is in the window, in bytes.
    pub fn offset(&self) -> u64 {
        self.start as u64
    }

    /// Number of floats.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Says that it will soon be dropped.
    pub fn returning(mut self) -> Span {
        if !self.is_returning {
            self.window.lock().returning += 1;
            self.is_returning = true;
        }
        self
    }

    pub fn floats(&self) -> &[f32] {
        // SAFETY: the bytes lie inside the mapping, aligned to pages, and are initialised (zero at first). `allocate` gave them to this
        // span alone, and the seal keeps other processes from writing.
        unsafe { std::slice::from_raw_parts(self.window.map.as_ptr().add(self.start).cast(), self.len) }
    }

    pub fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is borrowed mutably. Other processes may read meanwhile, which changes nothing here.
        unsafe { std::slice::from_raw_parts_mut(self.window.map.as_mut_ptr().add(self.start).cast(), self.len) }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let mut room = self.window.lock();
        room.used.retain(|used| used.start != self.start);
        room.returning -= usize::from(self.is_returning);
        drop(room);
        self.window.freed.notify_all();
    }
}

/// Another rank's window.
#[derive(Debug)]
pub(super) struct View {
    map: MmapRaw,
}

impl View {
    /// Maps what a rank has sent.
    ///
    /// # Errors
    /// What is no window, or cannot be mapped.
    pub fn of(file: OwnedFd) -> io::Result<View> {
        let file = File::from(file);
        // A file that could become shorter would end this process with a signal when it is read.
        let seals = rustix::fs::fcntl_get_seals(&file)?;
        if !seals.contains(SealFlags::SHRINK) || file.metadata()?.len() != SIZE as u64 {
            return Err(io::Error::new(ErrorKind::InvalidData, "what a rank sent is no memory of this version"));
        }
        Ok(View { map: MmapOptions::new().len(SIZE).map_raw_read_only(&file)? })
    }

    /// Copies numbers from byte `offset` on; false if they are outside.
    #[must_use]
    pub fn read<T: bytemuck::Pod>(&self, offset: u64, out: &mut [T]) -> bool {
        let bytes = size_of_val(out);
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start <= SIZE - bytes.min(SIZE)) else {
            return false;
        };
        if bytes > SIZE || !start.is_multiple_of(size_of::<T>()) {
            return false;
        }
        // SAFETY: the bytes lie inside the mapping, which is as long as the file and stays so (the seal), and `out` is memory of this
        // process. No reference to them is made: a rank that broke the protocol and wrote meanwhile would spoil the values, any bits
        // of which are numbers.
        unsafe { std::ptr::copy_nonoverlapping(self.map.as_ptr().add(start).cast(), out.as_mut_ptr(), out.len()) };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(window: &Window) -> View {
        View::of(window.file().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn what_a_rank_writes_another_reads() {
        let window = Arc::new(Window::create().unwrap());
        let view = view(&window);
        let _other = window.allocate(1500).unwrap();
        let mut span = window.allocate(1000).unwrap();
        span.floats_mut().iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
        let mut read = vec![0.0; 10];
        assert!(view.read(span.offset() + 4 * 500, &mut read));
        assert_eq!(read, span.floats()[500..510]);
    }

    #[test]
    fn nothing_outside_is_read() {
        let window = Window::create().unwrap();
        let view = view(&window);
        let mut out = [1.0f32; 2];
        for offset in [SIZE as u64 - 4, SIZE as u64, u64::MAX, u64::MAX - 7, 3] {
            assert!(!view.read(offset, &mut out), "{offset}");
        }
        assert!(view.read(SIZE as u64 - 8, &mut out) && view.read(SIZE as u64, &mut [0.0f32; 0]));
        assert_eq!(out, [0.0; 2]);
    }

    #[test]
    fn only_its_own_rank_can_write_a_window() {
        let window = Window::create().unwrap();
        let file = File::from(window.file().try_clone_to_owned().unwrap());
        assert!(MmapOptions::new().len(SIZE).map_raw(&file).is_err());
        assert!(file.set_len(0).is_err() && file.set_len(2 * SIZE as u64).is_err());
        assert!(io::Write::write(&mut &file, b"x").is_err());
    }

    #[test]
    fn what_is_no_window_is_refused() {
        let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(SIZE as u64).unwrap();
        assert!(View::of(file.try_clone().unwrap().into()).is_err(), "it could be cut");
        file.set_len(100).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(View::of(file.into()).is_err(), "it is short");
        assert!(View::of(File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    fn room_is_used_again_and_waited_for() {
        let window = Arc::new(Window::create().unwrap());
        let spans: Vec<Span> = [1024, 2048, 1024].iter().map(|len| window.allocate(*len).unwrap()).collect();
        assert_eq!(window.taken(), 4 * 4096);
        let [a, b, _c] = <[Span; 3]>::try_from(spans).unwrap();
        drop(b);
        assert_eq!(window.allocate(100).unwrap().offset(), 4096, "the lowest gap");
        let a = a.returning();
        let later = std::thread::scope(|scope| {
            let window = &window;
            let later = scope.spawn(move || window.allocate(3 * 1024).unwrap().offset());
            // By then it waits, most often; if it has not begun, it finds the room free, and this shows less.
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(a);
            later.join().unwrap()
        });
        assert_eq!((later, window.taken()), (0, 4 * 4096), "it waits for what is on its way back");
        assert!(window.allocate(usize::MAX / 8).is_err() && window.allocate(SIZE).is_err());
    }
}
