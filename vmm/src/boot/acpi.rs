//! ACPI tables: what a kernel that asks for them is told of the machine (ACPI specification 6.5).
//!
//! RSDP, XSDT, FADT, MADT and DSDT, and no more. The platform is "hardware-reduced" (4.1): no fixed
//! registers but those to sleep and to reset, no SCI. Events come through a Generic Event Device
//! (5.6.9) with one interrupt for each, so that no register has to say which it was.
//!
//! Linux does not use the reset register of such a platform if it has no EFI: it goes to real mode and
//! enters the firmware at the reset vector (linux `arch/x86/kernel/reboot.c`, `reboot_init`; the jump is in
//! `arch/x86/realmode/rm/reboot.S`). So there is a little code there that writes the register.
//!
//! The device of the VM generation id is Microsoft's "Virtual Machine Generation ID".

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::layout::{ACPI_TABLES, RESET_VECTOR, RSDP};
use super::{BootError, write};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"CLDLET";
const OEM_TABLE_ID: [u8; 8] = *b"CLOUDLET";
const OEM_REVISION: u32 = 1;
/// Revision of a DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// Bytes of a table header.
const HEADER_BYTES: u32 = 36;
/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 64;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// FADT, `IAPC_BOOT_ARCH`: there is no VGA to probe for, and no CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// What the power button's notification means: pressed (4.8.2.2.1.2).
const BUTTON_PRESSED: u8 = 0x80;
/// What the generation id's notification means: it has changed.
const GENERATION_CHANGED: u8 = 0x80;

/// A virtio device behind MMIO registers.
#[derive(Debug, Clone, Copy)]
pub struct VirtioMmio {
    /// First address of its registers.
    pub base: u32,
    /// Bytes of them.
    pub bytes: u32,
    /// Its interrupt.
    pub gsi: u32,
}

/// A serial port.
#[derive(Debug, Clone, Copy)]
pub struct SerialPort {
    /// Its first port.
    pub port: u16,
    /// How many ports.
    pub ports: u8,
    /// Its interrupt.
    pub gsi: u32,
}

/// The machine as far as the tables tell of it.
#[derive(Debug, Clone)]
pub struct Hardware {
    /// Virtual CPUs; their APIC ids are their numbers.
    pub cpus: u8,
    /// The serial port.
    pub serial: SerialPort,
    /// The virtio devices in their order.
    pub virtio: Vec<VirtioMmio>,
    /// The sleep control register, with the status register behind it.
    pub sleep_port: u16,
    /// What enters S5 there.
    pub sleep_type_off: u8,
    /// Port and value of a reset.
    pub reset: (u16, u8),
    /// Interrupt of the power button.
    pub button_gsi: u32,
    /// Where the VM generation id is: the start of a page.
    pub generation_at: u64,
    /// Interrupt that says that it has changed.
    pub generation_gsi: u32,
}

/// Write all tables and the code at the reset vector; returns where the root pointer is.
pub(super) fn write_tables(guest: &GuestRam, hardware: &Hardware) -> Result<u64, BootError> {
    let mut at = ACPI_TABLES;
    let mut place = |bytes: &[u8]| {
        let start = at;
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        at = start.saturating_add(len).next_multiple_of(ALIGNMENT);
        if at > RESET_VECTOR {
            return Err(BootError::AcpiSpace(at - ACPI_TABLES));
        }
        write(guest, bytes, start, "the ACPI tables")?;
        Ok(start)
    };
    let dsdt = place(dsdt(hardware).as_slice())?;
    let fadt = place(&bytes_of(&fadt(hardware, dsdt)))?;
    let madt = place(&bytes_of(&madt(hardware)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes_of(&xsdt))?;
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    write(guest, &rsdp, RSDP, "the ACPI root pointer")?;
    let code = reset_code(hardware.reset);
    write(guest, &code, RESET_VECTOR, "the reset vector")?;
    Ok(RSDP)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// What a processor that enters at the reset vector, in real mode, is to do.
fn reset_code((port, value): (u16, u8)) -> [u8; 9] {
    let [low, high] = port.to_le_bytes();
    [
        0xb0, value, // mov al, value
        0xba, low, high, // mov dx, port
        0xee, // out dx, al
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
    ]
}

/// The fixed description (5.2.9).
fn fadt(hardware: &Hardware, dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        let (space, access) = (AddressSpace::SystemIo, AccessSize::ByteAccess);
        GAS::new(space, 8, 0, access, port.into())
    };
    let (reset_port, reset_value) = hardware.reset;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(reset_port);
    fadt.reset_value = reset_value;
    fadt.sleep_control_reg = port(hardware.sleep_port);
    fadt.sleep_status_reg = port(hardware.sleep_port + 1);
    fadt.finalize()
}

/// The interrupt controllers (5.2.12).
fn madt(hardware: &Hardware) -> impl Aml {
    let controller = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for cpu in 0..hardware.cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

/// The devices (5.2.11.1), all in `\_SB`.
fn dsdt(hardware: &Hardware) -> Sdt {
    let mut devices = serial(hardware.serial);
    for (number, device) in (0u16..).zip(&hardware.virtio) {
        devices.extend(virtio(number, *device));
    }
    devices.extend(events(hardware));
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    let off = Package::new(vec![&hardware.sleep_type_off, &0u8, &0u8, &0u8]);
    dsdt.append_slice(&bytes_of(&Name::new(Path::new("\\_S5_"), &off)));
    dsdt
}

/// An edge-triggered interrupt of one device alone.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn serial(serial: SerialPort) -> Vec<u8> {
    let ports = IO::new(serial.port, serial.port, 1, serial.ports);
    let interrupt = interrupt(serial.gsi);
    bytes_of(&Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&ports, &interrupt]),
            ),
        ],
    ))
}

fn virtio(number: u16, device: VirtioMmio) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, device.base, device.bytes);
    let interrupt = interrupt(device.gsi);
    bytes_of(&Device::new(
        Path::new(&format!("V{number:03X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &number),
            // Its accesses to memory are coherent with the CPUs' caches.
            &Name::new(Path::new("_CCA"), &1u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&registers, &interrupt]),
            ),
        ],
    ))
}

/// Power button, generation id, and the device that tells the guest of both.
fn events(hardware: &Hardware) -> Vec<u8> {
    let (button, generation) = (hardware.button_gsi, hardware.generation_gsi);
    let mut devices = bytes_of(&Device::new(
        Path::new("PWRB"),
        vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"))],
    ));
    // The address in two halves, the lower one first.
    let (low, high) = (
        hardware.generation_at & 0xffff_ffff,
        hardware.generation_at >> 32,
    );
    devices.extend(bytes_of(&Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"CLDLVGID"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )));
    devices.extend(bytes_of(&Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &0u8),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&interrupt(button), &interrupt(generation)]),
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &button),
                        vec![&Notify::new(&Path::new("PWRB"), &BUTTON_PRESSED)],
                    ),
                    &If::new(
                        &Equal::new(&Arg(0), &generation),
                        vec![&Notify::new(&Path::new("VGEN"), &GENERATION_CHANGED)],
                    ),
                ],
            ),
        ],
    )));
    devices
}

#[cfg(test)]
#[path = "acpi_tests.rs"]
mod tests;
