// A handler of std::terminate.
#include "server/cli/uncaught.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <system_error>

namespace cachalot {
namespace {

[[noreturn]] void Terminate() {
  const std::exception_ptr exception = std::current_exception();
  try {
    if (exception != nullptr) std::rethrow_exception(exception);
  } catch (const std::system_error& error) {
    if (error.code() == std::errc::resource_unavailable_try_again) {
      std::fputs(
          "cachalot: the system gives no more threads: raise the limit of processes or of memory, or lower --threads\n",
          stderr);
    } else {
      std::fprintf(stderr, "cachalot: %s\n", error.what());
    }
    std::_Exit(1);
  } catch (const std::bad_alloc&) {
    std::fputs("cachalot: the system gives no more memory\n", stderr);
    std::_Exit(1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cachalot: %s\n", error.what());
  } catch (...) {
  }
  std::abort();
}

}  // namespace

void ExitOnUncaught() { std::set_terminate(Terminate); }

}  // namespace cachalot
