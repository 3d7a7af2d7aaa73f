// A TVM RPC server for boards, in one file without Python: it offers itself to a tracker under a key and serves one
// client after the other, each in a process of its own, so that whatever a client's library does, the server stays.
//
//   crossbit-board --tracker HOST:PORT --key KEY [--host ADDRESS] [--port PORT]

#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/support/socket.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace tvm {
namespace runtime {
void RPCServerLoop(int socket);  // rpc_socket_impl.cc
}
}  // namespace tvm

namespace {

using tvm::support::SockAddr;
using tvm::support::TCPSocket;

// What this board is ------------------------------------------------------------------------------------------------

#if defined(__aarch64__)
constexpr const char* kMachine = "aarch64";
// Bit i of AT_HWCAP and AT_HWCAP2 by the name that /proc/cpuinfo gives it: Linux arch/arm64/kernel/cpuinfo.c.
constexpr const char* kFeatures =
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 "
    "asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg";
constexpr const char* kFeatures2 =
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh "
    "rng bti mte";
#elif defined(__arm__)
constexpr const char* kMachine = "armv7l";  // also where a 64-bit kernel runs this 32-bit program
// Linux arch/arm/kernel/setup.c.
constexpr const char* kFeatures =
    "swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls vfpv4 idiva idivt "
    "vfpd32 lpae evtstrm";
constexpr const char* kFeatures2 = "aes pmull sha1 sha2 crc32";
#elif defined(__x86_64__)
constexpr const char* kMachine = "x86_64";
#else
#error "no board of this machine is known"
#endif

/*! \brief The value of the first line `name : value` of /proc/cpuinfo, '' if there is none. */
std::string CpuInfo(const std::string& name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    size_t colon = line.find(':');
    if (line.rfind(name, 0) == 0 && colon != std::string::npos) {
      return line.substr(std::min(line.size(), colon + 2));
    }
  }
  return "";
}

#if defined(__x86_64__)
std::string Features() { return CpuInfo("flags"); }
// Under QEMU /proc/cpuinfo is the file of the machine below.
bool Emulated() { return CpuInfo("vendor_id").empty(); }
std::string CpuPart() { return ""; }
#else
/*! \brief Those that the kernel lets programs use; QEMU answers for the CPU that it emulates. */
std::string Features() {
  std::string found;
  auto add = [&](const char* names, unsigned long bits) {
    std::istringstream stream(names);
    for (std::string name; stream >> name; bits >>= 1) {
      if (bits & 1) found += (found.empty() ? "" : " ") + name;
    }
  };
  add(kFeatures, getauxval(AT_HWCAP));
  add(kFeatures2, getauxval(AT_HWCAP2));
  return found;
}
// Under QEMU /proc/cpuinfo is the file of the machine below, and only ARM's has this line.
bool Emulated() { return CpuInfo("CPU implementer").empty(); }
/*! \brief The number that ARM gave this core, as /proc/cpuinfo writes it. */
std::string CpuPart() {
#if defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_CPUID) {
    unsigned long id;
    asm("mrs %0, MIDR_EL1" : "=r"(id));
    char part[16];
    snprintf(part, sizeof part, "0x%03lx", id >> 4 & 0xfff);
    return part;
  }
#endif
  return Emulated() ? "" : CpuInfo("CPU part");
}
#endif

/*! \brief What it is sold as, '' where the kernel does not say. */
std::string Model() {
  std::string model;
  std::ifstream file("/proc/device-tree/model");
  std::getline(file, model, '\0');
  return model.empty() ? CpuInfo("model name") : model;
}

std::string g_folder;  // of this session; the process's own

TVM_FFI_STATIC_INIT_BLOCK() {
  using tvm::ffi::String;
  tvm::ffi::reflection::GlobalDef()
      .def("tvm.rpc.server.workpath", [](const String& name) { return String(g_folder + "/" + std::string(name)); })
      .def("tvm.rpc.server.load_module",
           [](const String& name) { return tvm::ffi::Module::LoadFromFile(g_folder + "/" + std::string(name)); })
      // One `name=value` a line.
      .def("crossbit.board_info",
           [] {
             std::string emulated = Emulated() ? "yes" : "no";
             return String(std::string("machine=") + kMachine + "\npart=" + CpuPart() + "\nfeatures=" + Features() +
                           "\nemulated=" + emulated + "\nmodel=" + (Emulated() ? "" : Model()));
           })
      // MetaSchedule fills the arguments of what it measures with it. TVM has it in its extra library; any values will
      // do, as long as floats are ordinary ones.
      .def("tvm.contrib.random.random_fill_for_measure", [](DLTensor* tensor) {
        size_t size = tensor->dtype.bits * tensor->dtype.lanes / 8;
        for (int i = 0; i < tensor->ndim; ++i) size *= tensor->shape[i];
        auto* bytes = static_cast<uint8_t*>(tensor->data) + tensor->byte_offset;
        std::minstd_rand draw;
        if (tensor->dtype.code == kDLFloat && tensor->dtype.bits == 32) {
          for (size_t i = 0; i < size / 4; ++i) reinterpret_cast<float*>(bytes)[i] = draw() / 2147483648.0f;
        } else {
          for (size_t i = 0; i < size; ++i) bytes[i] = draw() >> 8;
        }
      });
}

// Waiting -----------------------------------------------------------------------------------------------------------

int g_signals = -1;  // a descriptor that is readable when there was one

[[noreturn]] void Leave(const std::string& reason) {
  fprintf(stderr, "error: %s\n", reason.c_str());
  exit(2);
}

/*! \brief Which of two descriptors can be read, and whether a child ended. */
struct Ready {
  bool first = false, second = false, child = false;
};
struct Interrupted {};

/*! \brief Wait for any of that, `milliseconds` at most (-1: for ever); descriptors may be -1. Ctrl-C throws. */
Ready Wait(int first, int second, int milliseconds) {
  pollfd files[] = {{first, POLLIN, 0}, {second, POLLIN, 0}, {g_signals, POLLIN, 0}};
  if (poll(files, 3, milliseconds) < 0) return {};
  Ready ready{files[0].revents != 0, files[1].revents != 0, false};
  signalfd_siginfo signal;
  if (files[2].revents != 0 && read(g_signals, &signal, sizeof signal) == sizeof signal) {
    if (signal.ssi_signo != SIGCHLD) throw Interrupted();
    ready.child = true;
  }
  return ready;
}

// The tracker -------------------------------------------------------------------------------------------------------

constexpr int kMagic = 0xff271, kTrackerMagic = 0x2f271, kMismatch = kMagic + 2;  // tvm/rpc/base.py
constexpr int kPut = 3, kUpdateInfo = 5, kPendingKeys = 7;

bool SendText(TCPSocket socket, const std::string& text) {
  int size = text.size();
  return socket.SendAll(&size, sizeof size) == sizeof size && socket.SendAll(text.data(), size) == text.size();
}

bool ReceiveText(TCPSocket socket, std::string* text) {
  int size;
  if (socket.RecvAll(&size, sizeof size) != sizeof size || size < 0 || size > 1 << 20) return false;
  text->resize(size);
  return socket.RecvAll(text->data(), size) == text->size();
}

/*! \brief Let no peer that falls silent keep the server; 0 seconds: it may. */
void GiveUpAfter(TCPSocket socket, int seconds) {
  timeval limit{seconds, 0};
  setsockopt(socket.descriptor(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(socket.descriptor(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

class Tracker {
 public:
  Tracker(const std::string& host, int host_port, const std::string& key, int port)
      : host_(host), host_port_(host_port), key_(key), port_(port), draw_(std::random_device{}()) {}

  /*! \brief Offer this board under a new one-time key; connects if need be. */
  bool Offer() {
    if (socket_.BadSocket() && !Connect()) return false;
    match_key_ = key_ + ":0." + std::to_string(draw_());
    std::string port = std::to_string(port_);
    return Ask("[" + std::to_string(kPut) + ", \"" + key_ + "\", [" + port + ", \"" + match_key_ + "\"], null]");
  }
  /*! \brief Whether nobody asked for the board since `Offer`; also tells the tracker that it lives. */
  bool Pending() {
    return Ask("[" + std::to_string(kPendingKeys) + "]") && answer_.find('"' + match_key_ + '"') != std::string::npos;
  }
  void Close() { socket_.Close(); }
  int descriptor() const { return socket_.descriptor(); }
  bool connected() const { return !socket_.BadSocket(); }
  const std::string& match_key() const { return match_key_; }

 private:
  bool Connect() {
    SockAddr address(host_.c_str(), host_port_);
    if (!address.known()) return Say("has no address");
    socket_.Create(address.ss_family());
    GiveUpAfter(socket_, 5);
    int magic = kTrackerMagic;
    bool answered = socket_.Connect(address) && socket_.SendAll(&magic, sizeof magic) == sizeof magic &&
                    socket_.RecvAll(&magic, sizeof magic) == sizeof magic;
    if (!answered || magic != kTrackerMagic) {
      socket_.Close();
      return Say("does not answer");
    }
    std::string port = std::to_string(port_), update = std::to_string(kUpdateInfo);
    if (!Ask("[" + update + ", {\"key\": \"server:" + key_ + "\", \"addr\": [null, " + port + "]}]")) return false;
    Say("has this board");
    return true;
  }
  bool Ask(const std::string& question) {
    if (SendText(socket_, question) && ReceiveText(socket_, &answer_)) return true;
    socket_.Close();
    return Say("went away");
  }
  /*! \brief Print what is new. */
  bool Say(const std::string& state) {
    if (state != said_) fprintf(stderr, "tracker %s:%d %s\n", host_.c_str(), host_port_, state.c_str());
    said_ = state;
    return false;
  }

  std::string host_;
  int host_port_;
  std::string key_;
  int port_;
  std::mt19937 draw_;
  TCPSocket socket_;
  std::string match_key_, answer_, said_;
};

// Sessions ----------------------------------------------------------------------------------------------------------

struct Client {
  TCPSocket socket;
  std::string name;
  double seconds = 0;  // the longest that its session may last, 0: for ever
};

/*! \brief Take a connection if it shows the one-time key. */
bool Accept(int listener, const Tracker& tracker, const std::string& key, Client* client) {
  sockaddr_storage address;
  socklen_t size = sizeof address;
  client->socket = TCPSocket(accept4(listener, reinterpret_cast<sockaddr*>(&address), &size, SOCK_CLOEXEC));
  if (client->socket.BadSocket()) return false;
  char text[NI_MAXHOST] = "?";
  getnameinfo(reinterpret_cast<sockaddr*>(&address), size, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  client->name = text;
  GiveUpAfter(client->socket, 5);
  int magic = 0;
  std::string shown;
  if (client->socket.RecvAll(&magic, sizeof magic) == sizeof magic && magic == kMagic &&
      ReceiveText(client->socket, &shown)) {
    // "client:KEY:0.123 -timeout=10"
    size_t space = shown.find(' '), timeout = shown.find(" -timeout=");
    bool matches = shown.substr(0, space) == "client:" + tracker.match_key();
    magic = matches ? kMagic : kMismatch;
    client->socket.SendAll(&magic, sizeof magic);
    if (matches && SendText(client->socket, "server:" + key)) {
      client->seconds = timeout == std::string::npos ? 0 : atof(shown.c_str() + timeout + 10);
      GiveUpAfter(client->socket, 0);
      return true;
    }
  }
  client->socket.Close();
  return false;
}

/*! \brief Wait for the client that the tracker sends.
 *  \return false where the board has to be offered again: the tracker went, or a client took the key and never came. */
bool AwaitClient(int listener, Tracker* tracker, const std::string& key, Client* client) {
  for (int taken = 0; taken < 4;) {
    Ready ready = Wait(listener, tracker->descriptor(), 2000);
    if (ready.first && Accept(listener, *tracker, key, client)) return true;
    if (ready.second) tracker->Close();  // nothing was asked, so it says good-bye
    if (ready.first || ready.child) continue;
    taken = tracker->connected() && tracker->Pending() ? 0 : taken + 1;
    if (!tracker->connected()) return false;
  }
  return false;
}

/*! \brief How a process ended badly, '' if it did not. */
std::string Death(int status) {
  if (WIFEXITED(status)) return WEXITSTATUS(status) ? "it ended with an error" : "";
  int signal = WTERMSIG(status);
  if (signal == SIGILL) return "illegal instruction (SIGILL): the library has one that this CPU lacks";
  if (signal == SIGSEGV || signal == SIGBUS) return "memory that is not there (SIGSEGV): the library is broken";
  if (signal == SIGKILL) return "killed (SIGKILL), perhaps for want of memory";
  return std::string("died: ") + strsignal(signal);
}

/*! \brief Run one client's requests in a process and a folder of its own. */
void Serve(Client client, int number) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point start = Clock::now();
  auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  std::string folder = (std::filesystem::temp_directory_path() / "crossbit-board-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) Leave("cannot make a folder like " + folder + ": " + strerror(errno));
  fprintf(stderr, "session %d for %s\n", number, client.name.c_str());
  pid_t child = fork();
  if (child < 0) Leave(std::string("cannot start a process: ") + strerror(errno));
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    g_folder = folder;
    if (chdir(folder.c_str())) _exit(1);
    try {
      tvm::runtime::RPCServerLoop(client.socket.descriptor());
    } catch (const std::exception& error) {
      fprintf(stderr, "session %d: %s\n", number, error.what());
      _exit(1);
    }
    _exit(0);
  }
  auto clean = [&] {
    std::error_code ignored;  // a folder in /tmp
    std::filesystem::remove_all(folder, ignored);
  };
  int status = 0;
  std::string reason, kind;
  try {
    while (waitpid(child, &status, WNOHANG) == 0) {
      if (client.seconds > 0 && seconds() > client.seconds) {
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        reason = "more than the " + std::to_string(int(client.seconds)) + " seconds that it asked for";
        kind = "RPCSessionTimeoutError: ";  // by which the client knows it
        break;
      }
      Wait(-1, -1, client.seconds > 0 ? 100 : -1);
    }
  } catch (const Interrupted&) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    clean();
    throw;
  }
  clean();
  if (reason.empty()) reason = Death(status);
  if (!reason.empty()) {  // the process cannot say it any more; this socket is the same
    std::string message = kind + reason;
    GiveUpAfter(client.socket, 5);
    (*tvm::ffi::Function::GetGlobal("rpc.ReturnException"))(client.socket.descriptor(), message);
  }
  client.socket.Close();
  fprintf(stderr, "session %d over after %.1f s%s%s\n", number, seconds(), reason.empty() ? "" : ": ", reason.c_str());
}

/*! \brief A socket that listens; `port` 0 becomes the one that the system gave. */
int Listen(const std::string& host, int* port) {
  SockAddr address(host.c_str(), *port);
  if (!address.known()) Leave("'" + host + "' is no address of this machine");
  int listener = socket(address.ss_family(), SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, address.get(), address.size()) || listen(listener, 8)) {
    Leave("cannot listen at " + address.AsString() + ": " + strerror(errno));
  }
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(listener, reinterpret_cast<sockaddr*>(&bound), &size);
  *port = ntohs(reinterpret_cast<sockaddr_in*>(&bound)->sin_port);  // IPv6 has it in the same place
  return listener;
}

[[noreturn]] void Usage() {
  Leave("write crossbit-board --tracker HOST:PORT --key KEY [--host ADDRESS] [--port PORT]; a key is of letters, digits "
        "and ._-");
}

int PortNumber(const std::string& text) {
  char* end;
  long port = strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || port < 0 || port > 65535) Usage();
  return port;
}

}  // namespace

int main(int count, char** arguments) {
  std::string host = "0.0.0.0", tracker_address, key;
  int port = 0;
  for (int i = 1; i < count; i += 2) {
    std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--tracker") {
      tracker_address = value;
    } else if (name == "--key") {
      key = value;
    } else if (name == "--host") {
      host = value;
    } else if (name == "--port") {
      port = PortNumber(value);
    } else {
      Usage();
    }
  }
  size_t colon = tracker_address.rfind(':');
  bool plain = key.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == key.npos;
  if (key.empty() || !plain || colon == std::string::npos) Usage();
  int tracker_port = PortNumber(tracker_address.substr(colon + 1));

  sigset_t handled;
  sigemptyset(&handled);
  for (int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&handled, signal);
  struct sigaction hangup;
  sigaction(SIGHUP, nullptr, &hangup);
  if (hangup.sa_handler != SIG_IGN) sigaddset(&handled, SIGHUP);  // under nohup it goes on
  sigprocmask(SIG_BLOCK, &handled, nullptr);
  signal(SIGPIPE, SIG_IGN);
  g_signals = signalfd(-1, &handled, SFD_CLOEXEC);

  int listener = Listen(host, &port);
  fprintf(stderr, "board '%s': %s%s%s, %u cores, port %d\n", key.c_str(), kMachine, Emulated() ? ", emulated" : "",
          CpuPart().empty() ? "" : (", core " + CpuPart()).c_str(), std::thread::hardware_concurrency(), port);
  Tracker tracker(tracker_address.substr(0, colon), tracker_port, key, port);
  try {
    for (int sessions = 0;;) {
      Client client;
      if (!tracker.Offer()) {
        Wait(-1, -1, 1000);
      } else if (AwaitClient(listener, &tracker, key, &client)) {
        Serve(client, ++sessions);
      }
    }
  } catch (const Interrupted&) {
    fprintf(stderr, "board '%s' ended\n", key.c_str());
  }
  return 0;
}
